"""Plain CUDA IPC: reads a seed's memory on the same host, over NVLink or PCIe, through the CUDA driver alone.

:mod:`.engine` is the adapter, :mod:`.driver` the calls of ``libcuda.so.1``, :mod:`.endpoint` what a peer needs to know.
"""
