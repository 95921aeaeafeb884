"""NIXL over UCX: RDMA, CUDA IPC, shared memory or TCP."""
