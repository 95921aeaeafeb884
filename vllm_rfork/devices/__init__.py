"""Memory of the host, CUDA and Ascend devices behind one interface, :class:`~vllm_rfork.devices.base.DeviceBackend`.

Other packages call :func:`~vllm_rfork.devices.registry.device_backend`. Uses torch, except in ``allocator_blocks.py``;
``torch_npu`` is imported with the first NPU.
"""
