"""A played worker in a process of its own: it registers, takes all requests, and sends their tokens at given times."""

from __future__ import annotations

import time
from contextlib import closing
from multiprocessing.connection import Connection

from tetri.core.actions import BROKER
from tetri.cost import Cost
from tetri.engine.emulated import EmulatedEngine
from tetri.instance import Capacity, Instance, Reach
from tetri.net.hub import Hub
from tetri.request import Receipt, Stage
from tetri.wire.events import Arrived, PeerUp
from tetri.wire.load import Load
from tetri.wire.messages import (
    Assign,
    Close,
    End,
    Heartbeat,
    InboxMessage,
    Membership,
    Ready,
    Staged,
    TokenItem,
    Tokens,
)

IID, TOKEN = "m0", 97  # its tokens are the letter a
CAPACITY = Capacity(blocks=1 << 20, block_tokens=16, chunk_tokens=1 << 15, max_batch=1 << 14, context=1 << 13)
HEARTBEAT_S, PATIENCE_S = 0.2, 60.0
LEAD_S = 0.5  # from the last request's arrival to the first token


class PlayedWorker:
    """One mixed instance, which never computes."""

    def __init__(self, hub: Hub, events: str, inbox: str) -> None:
        self.hub, self.rids, self.outputs = hub, dict[str, int](), 0
        self._epoch = self._read = 0
        self._due = 0.0
        engine = EmulatedEngine(capacity=CAPACITY, token_bytes=8, vocabulary=257, cost=Cost())
        reach = Reach(paths=["local"], host="", process=0, segment=IID)
        self._instance = Instance(
            iid=IID, incarnation=1, role="mixed", inbox=inbox, fingerprint=engine.fingerprint, capacity=CAPACITY,
            reach=reach,
        )  # fmt: skip
        hub.bind_inbox(inbox, InboxMessage)
        hub.connect(BROKER, events)

    def turn(self, most_s: float) -> None:
        """Hear what has arrived, and send a heartbeat when it is time."""
        for event in self.hub.poll(max(0.0, min(most_s, self._due - time.monotonic()))):
            message = event.message if isinstance(event, Arrived) else event
            match message:
                case PeerUp():
                    self.hub.send(BROKER, Ready(instance=self._instance, load=self._load()))
                case Membership():
                    self._epoch, self._read = message.epoch, message.serial
                case Assign(rid=rid, attempt=attempt):
                    self.rids[rid] = attempt
                    stage = Staged(iid=IID, incarnation=1, rid=rid, attempt=attempt, stage=Stage.DECODE)
                    self.hub.send(BROKER, stage)
                case Close(rid=rid):
                    self.rids.pop(rid, None)
        if self._epoch and time.monotonic() >= self._due:
            self._due = time.monotonic() + HEARTBEAT_S
            self.hub.send(BROKER, Heartbeat(iid=IID, incarnation=1, role="mixed", load=self._load(), holds=None,
                                            epoch=self._epoch, read=self._read))  # fmt: skip

    def _load(self) -> Load:
        return Load(free_blocks=CAPACITY.blocks, running=len(self.rids))

    def serve(self, streams: int, steps: int, step_s: float) -> list[float]:
        """Take so many requests and send all their tokens, one of each every `step_s`. Returns when each step was sent.
        Raises TimeoutError."""
        self._until(lambda: len(self.rids) >= streams)
        rows, begin, sent = [*self.rids.items()], time.monotonic() + LEAD_S, list[float]()
        for step in range(steps):
            while (left := begin + step * step_s - time.monotonic()) > 0:
                self.turn(left)
            end = End(reason="length", receipt=Receipt(prompt_tokens=1)) if step == steps - 1 else None
            items = [TokenItem(rid=rid, attempt=attempt, start=step, ids=[TOKEN], end=end) for rid, attempt in rows]
            sent.append(time.monotonic())
            self.hub.send(BROKER, Tokens(iid=IID, incarnation=1, items=items))
        self._until(lambda: not self.rids)
        return sent

    def _until(self, condition: object) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():  # type: ignore[operator]
            self.turn(0.05)
            if time.monotonic() > end:
                raise TimeoutError(f"the played worker has {len(self.rids)} requests after {PATIENCE_S:g} s")


def play(events: str, inbox: str, orders: Connection) -> None:
    """Serve what the other process orders, (streams, steps, seconds a step), until it orders nothing more: None."""
    with closing(Hub()) as hub:
        worker = PlayedWorker(hub, events, inbox)
        while True:
            while not orders.poll():
                worker.turn(0.02)
            if (order := orders.recv()) is None:
                return
            orders.send(worker.serve(*order))
