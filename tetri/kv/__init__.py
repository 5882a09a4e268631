"""KV stores: where a chunk's blocks lie between the sender's engine and the receiver's."""

from __future__ import annotations

from tetri.kv.base import KVError, KVStore


def open_store(
    transport: str, deployment: str, iid: str, slots: int, block_bytes: int, digest: bool = True
) -> KVStore:
    """A store of `slots` blocks of `block_bytes`. Raises KVError: unknown transport, or no room for it."""
    # Each transport may need what the others do not (a GPU's library), so it is imported on use.
    if transport == "local":
        from tetri.kv.local import LocalStore

        return LocalStore(iid, slots, block_bytes, digest=digest)
    if transport == "shm":
        from tetri.kv.shm import ShmStore, sweep

        sweep(deployment, iid)  # what a killed predecessor left may be the memory that is needed now
        return ShmStore(deployment, iid, slots, block_bytes, digest=digest)
    raise KVError(f"unknown KV transport {transport[:80]!r}: use local or shm")
