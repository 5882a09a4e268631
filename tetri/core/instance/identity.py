"""A worker's own identity: what others know of it, and the settings it works by."""

from __future__ import annotations

from dataclasses import dataclass

from tetri.cost import Cost
from tetri.instance import Instance
from tetri.policy.rules import Rules
from tetri.request import Capacity, Expected, blocks_for


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a worker is and by which rules it works. Times are in seconds; `slots` are the blocks that its own KV
    store holds. `instance` is what it says of itself, in the role that it starts with; the broker may change that
    later. `cost` is what it predicts with.

    `stream_interval`: output tokens of a request that a decode instance sends in one message. A step may advance by
    as many, so a message may hold up to twice as many, less one."""

    instance: Instance
    slots: int
    rules: Rules = Rules()
    cost: Cost = Cost()
    reserve_share: float = 0.5
    heartbeat_s: float = 0.2
    load_s: float = 0.1
    offer_s: float = 1.0
    patience_s: float = 60.0
    view_s: float = 2.0  # without a roster for so long, the worker registers again; without a view, loads are unknown
    stream_interval: int = 1
    expected: Expected | None = None  # of output lengths, while rules.length is "trained"

    @property
    def iid(self) -> str:
        return self.instance.iid

    @property
    def incarnation(self) -> int:
        return self.instance.incarnation

    @property
    def capacity(self) -> Capacity:
        return self.instance.capacity

    @property
    def open_slots(self) -> int:
        """Slots for the KV of requests that no decode instance has taken yet; the rest, the blocks that one chunk may
        fill, are for the others (core/prefill/kv_send.py)."""
        block = self.capacity.block_tokens
        return max(self.slots - blocks_for(self.capacity.chunk_tokens + block - 1, block), 0)
