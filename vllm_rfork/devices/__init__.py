"""What differs between the processor, CUDA and Ascend about memory, behind one small face.

Everything above asks :func:`~vllm_rfork.devices.registry.device_side` and never a backend of its own. Here torch is
allowed and vLLM is not; ``allocator_blocks.py`` needs neither. Nothing here imports ``torch_npu`` before an NPU is
asked for.
"""
