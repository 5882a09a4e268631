"""The KV path `nixl`: one-sided reads of a peer's slab, over RDMA where the hosts have it."""
