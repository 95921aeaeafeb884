"""NIXL over UCX: RDMA, CUDA IPC, cross-memory attach or TCP."""
