"""What differs between the processor, CUDA and Ascend about memory, behind one small face.

Everything above asks :func:`~vllm_rfork.devices.choice.device_side` and never a backend of its own. Here torch is
allowed and vLLM is not; ``blocks.py`` needs neither. Nothing in this package imports ``torch_npu`` before somebody asks
for an NPU.
"""
