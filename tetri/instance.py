"""What an instance is, as a worker announces it and all other processes know it: its name, role, capacity, the kind of
its KV bytes, and how others read them."""

from __future__ import annotations

from tetri.request import Address, Name, Positive, Record


class Fingerprint(Record, frozen=True):
    """The properties that two engines must share so that each can use the other's KV bytes (docs/design.md, 6)."""

    engine: str
    version: str
    isa: str
    model: str
    weights: str
    dtype: str
    kv_dtype: str
    block_tokens: int
    block_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    parallel: int = 1


def difference(a: Fingerprint, b: Fingerprint) -> str | None:
    """The first field in which two fingerprints differ, with both values; None if KV can move between them."""
    if a == b:  # the usual case, fast
        return None
    for name in Fingerprint.__struct_fields__:
        left, right = getattr(a, name), getattr(b, name)
        if left != right:
            return f"{name} differs: {left} and {right}"
    return None


class Capacity(Record, frozen=True):
    """Capacity of one engine: `blocks` KV blocks in total, `chunk_tokens` tokens in a step, `max_batch` decodes at
    once."""

    blocks: Positive
    block_tokens: Positive
    chunk_tokens: Positive
    max_batch: Positive
    context: Positive  # tokens, prompt and output together

    @property
    def tokens(self) -> int:
        """Tokens that the KV memory holds."""
        return self.blocks * self.block_tokens


class Reach(Record, frozen=True):
    """The KV paths of an instance and where its slab can be read.

    paths     KV paths that it supports (policy/pairing.py)
    host      equal for instances that share a machine, its shared memory and a user
    process   equal for instances in one process of that host
    segment   name of its slab, unique to this start of the process
    address   where it serves the path `stream`, "" if it does not
    device    UUID of the GPU that holds the slab, "" for host memory
    near      UUIDs of the GPUs that this GPU can access
    tickets   path -> bytes that a receiver needs to open the slab over this path
    """

    paths: list[str]
    host: str
    process: int
    segment: str
    address: str = ""
    device: str = ""
    near: list[str] = []
    tickets: dict[str, bytes] = {}


class Instance(Record, frozen=True):
    """One start of one worker.

    incarnation   random number, drawn once per start: distinguishes a restarted worker from its predecessor
    role          which new work it takes; the only field that changes while the process runs
    inbox         address of its PULL socket
    fingerprint   of the KV bytes of its engine: KV moves only between equal ones
    reach         how other workers read its KV
    """

    iid: Name
    incarnation: int
    role: str
    inbox: Address
    fingerprint: Fingerprint
    capacity: Capacity
    reach: Reach

    def in_role(self, role: str) -> Instance:
        """Return the same instance in another role."""
        return self.changed(role=role)
