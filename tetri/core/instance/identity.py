"""A worker's own identity: its instance record and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tetri.core.actions import BROKER, Send
from tetri.cost import Cost
from tetri.instance import Capacity, Instance
from tetri.policy.rules import Rules
from tetri.request import Expected, blocks_for
from tetri.wire.messages import WorkerEvent


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity and settings of a worker. All times are in seconds.

    instance          what other processes know of it, in its initial role (flips change the role later)
    slots             KV blocks that its own slab holds
    rules, cost       its policies, and the cost table of its predictions
    compares_steps    whether the time of its engine steps is compared with `cost`
    reserve_share     share of the KV blocks that reservations may hold
    heartbeat_s       between two heartbeats
    load_s            between two load reports
    offer_s           after which an unanswered offer is repeated
    patience_s        that a request waits for a decode instance that can hold it
    view_s            without a Membership for so long, the worker registers again; without a ClusterView for so long,
                      it forgets the loads
    stream_interval   output tokens of a request per message. A step may produce as many, so a message has at most
                      twice as many, less one
    expected          expected output lengths, set while `rules.length` is "trained"
    traces            whether it traces what happens to its choices, for their timelines
    iid, incarnation, capacity    those of the instance: each event asks for them several times
    open_slots        slots that requests without a grant may use. The rest, as many blocks as one chunk may fill, is
                      reserved for granted requests (core/prefill/kv_send.py)
    """

    instance: Instance
    slots: int
    rules: Rules = Rules()
    cost: Cost = Cost()
    compares_steps: bool = True
    reserve_share: float = 0.5
    heartbeat_s: float = 0.2
    load_s: float = 0.1
    offer_s: float = 1.0
    patience_s: float = 60.0
    view_s: float = 2.0
    stream_interval: int = 1
    expected: Expected | None = None
    traces: bool = True
    iid: str = field(init=False)
    incarnation: int = field(init=False)
    capacity: Capacity = field(init=False)
    open_slots: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("iid", "incarnation", "capacity"):
            object.__setattr__(self, name, getattr(self.instance, name))
        block = self.capacity.block_tokens
        reserve = blocks_for(self.capacity.chunk_tokens + block - 1, block)
        object.__setattr__(self, "open_slots", max(self.slots - reserve, 0))

    def report(self, kind: Callable[..., WorkerEvent], **fields: Any) -> Send:
        """Return the action that sends the broker a message of this kind, with the fields of its sender."""
        return Send(BROKER, kind(iid=self.iid, incarnation=self.incarnation, **fields))

    def address(self, rid: str, attempt: int, offer: int | None) -> dict[str, Any]:
        """Return the fields that identify an offer in the messages of this instance to other workers."""
        return {"src": self.iid, "incarnation": self.incarnation, "rid": rid, "attempt": attempt, "offer": offer}

    @property
    def look_s(self) -> float:
        """Seconds after which a deferred offer moves, if another instance has reported free memory."""
        return min(10 * self.load_s, self.renew_s)

    @property
    def renew_s(self) -> float:
        """Seconds after which a deferred offer is repeated, so that the decode instance keeps it."""
        return 10 * self.offer_s
