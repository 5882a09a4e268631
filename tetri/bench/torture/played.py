"""The broker's core with played workers: what a deployment does too seldom for a measurement."""

from __future__ import annotations

from random import Random

from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.cost import Cost
from tetri.engine.emulated import EmulatedEngine
from tetri.instance import Capacity, Instance, Reach
from tetri.policy.rules import Rules
from tetri.wire.load import Load
from tetri.wire.messages import Ready

CAPACITY = Capacity(blocks=4096, block_tokens=16, chunk_tokens=512, max_batch=32, context=1 << 14)
VOCABULARY = 1000


def broker() -> Broker:
    """A core that knows no worker, at time 0."""
    return Broker(Limits(context=CAPACITY.context, vocabulary=VOCABULARY), Rules(), 1, Random(1), 0.0)


def ready(iid: str, role: str) -> Ready:
    """The message with which a worker registers."""
    engine = EmulatedEngine(capacity=CAPACITY, token_bytes=8, vocabulary=VOCABULARY, cost=Cost())
    reach = Reach(paths=["shm"], host="host", process=0, segment=f"tetri-torture-{iid}-{0:016x}")
    instance = Instance(
        iid=iid, incarnation=1, role=role, inbox=f"ipc:///tmp/tetri-torture/inbox-{iid}",
        fingerprint=engine.fingerprint, capacity=CAPACITY, reach=reach,
    )  # fmt: skip
    return Ready(instance=instance, load=Load(free_blocks=CAPACITY.blocks))
