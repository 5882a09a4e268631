"""The KV path `cuda_ipc`: a slab in GPU memory, shared by CUDA IPC handles and events."""
