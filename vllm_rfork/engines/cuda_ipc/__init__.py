"""CUDA IPC through the CUDA driver: reads a seed's memory on the same host, over NVLink or PCIe.

:mod:`.engine` is the adapter, :mod:`.driver` calls ``libcuda.so.1``, :mod:`.streams` copies, :mod:`.endpoint` describes
an engine to its peers.
"""
