"""Played workers in a process of their own: they register, take all requests, and send their tokens at given times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
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
from tetri.wire.observation import Activity, EngineStep, Transferred

TOKEN = 97  # the letter a
CAPACITY = Capacity(blocks=1 << 20, block_tokens=16, chunk_tokens=1 << 15, max_batch=1 << 14, context=1 << 13)
HEARTBEAT_S, PATIENCE_S = 0.2, 60.0
LEAD_S = 0.5  # from the last request's arrival to the first token
STEP_S = 0.01  # that an engine step is said to take
TURN_S = 0.005  # between two looks at what has arrived, if there are several workers


class PlayedWorker:
    """One mixed instance, which never computes. `rids`: its requests and their attempts."""

    def __init__(self, hub: Hub, iid: str, events: str, inbox: str) -> None:
        self.hub, self.iid, self.rids = hub, iid, dict[str, int]()
        self._activity = Activity()
        self._epoch = self._read = 0
        self._due = 0.0
        engine = EmulatedEngine(capacity=CAPACITY, token_bytes=8, vocabulary=257, cost=Cost())
        reach = Reach(paths=["local"], host="", process=0, segment=iid)
        self._instance = Instance(
            iid=iid, incarnation=1, role="mixed", inbox=inbox, fingerprint=engine.fingerprint, capacity=CAPACITY,
            reach=reach,
        )  # fmt: skip
        hub.bind_inbox(inbox, InboxMessage)
        hub.connect(BROKER, events)

    @property
    def registered(self) -> bool:
        """Whether the broker has answered."""
        return self._epoch > 0

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
                    stage = Staged(iid=self.iid, incarnation=1, rid=rid, attempt=attempt, stage=Stage.DECODE)
                    self.hub.send(BROKER, stage)
                case Close(rid=rid):
                    self.rids.pop(rid, None)
        if self._epoch and time.monotonic() >= self._due:
            self._due = time.monotonic() + HEARTBEAT_S
            self.hub.send(BROKER, Heartbeat(iid=self.iid, incarnation=1, role="mixed", load=self._load(), holds=None,
                                            epoch=self._epoch, read=self._read, at=time.monotonic(),
                                            activity=self._activity))  # fmt: skip

    def _load(self) -> Load:
        return Load(free_blocks=CAPACITY.blocks, running=len(self.rids))

    def step(self, number: int, last: bool) -> None:
        """Send one token of each of its requests, the last one if `last`."""
        end = End(reason="length", receipt=Receipt(prompt_tokens=1)) if last else None
        items = [
            TokenItem(rid=rid, attempt=attempt, start=number, ids=[TOKEN], end=end)
            for rid, attempt in self.rids.items()
        ]
        done, now = self._activity, time.monotonic()
        self._activity = Activity(
            steps=done.steps + 1, step_s=done.step_s + STEP_S, decode_steps=done.decode_steps + 1,
            decode_tokens=done.decode_tokens + len(items), received={"shm": Transferred(chunks=done.steps + 1)},
        )  # fmt: skip
        step = EngineStep(at=now, seconds=STEP_S, batch=len(items))
        self.hub.send(BROKER, Tokens(iid=self.iid, incarnation=1, items=items, step=step))


class PlayedWorkers:
    """Several, which one process plays."""

    def __init__(self, workers: Sequence[PlayedWorker]) -> None:
        self.workers = workers

    def turn(self, most_s: float) -> None:
        """Hear what has arrived, wait at most so long if it is nothing, and send heartbeats when it is time."""
        *others, last = self.workers
        for worker in others:
            worker.turn(0)
        last.turn(min(most_s, TURN_S) if others else most_s)

    def open(self) -> int:
        """Their requests."""
        return sum(len(worker.rids) for worker in self.workers)

    def serve(self, streams: int, steps: int, step_s: float) -> list[float]:
        """Take so many requests and send all their tokens, one of each every `step_s`. Returns when each step was sent.
        Raises TimeoutError."""
        self.until(lambda: self.open() >= streams)
        begin, sent = time.monotonic() + LEAD_S, list[float]()
        for step in range(steps):
            while (left := begin + step * step_s - time.monotonic()) > 0:
                self.turn(left)
            sent.append(time.monotonic())
            for worker in self.workers:
                if worker.rids:
                    worker.step(step, step == steps - 1)
        self.until(lambda: not self.open())
        return sent

    def until(self, condition: Callable[[], bool]) -> None:
        """Take turns until then. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            self.turn(0.05)
            if time.monotonic() > end:
                raise TimeoutError(f"the played workers have {self.open()} requests after {PATIENCE_S:g} s")


def play(events: str, inboxes: dict[str, str], orders: Connection) -> None:
    """Play the workers at these inboxes. Tell the other process when all are registered: None. Then serve what it
    orders, (streams, steps, seconds a step), until it orders nothing more: None."""
    with ExitStack() as stack:
        hubs = {iid: stack.enter_context(closing(Hub())) for iid in inboxes}
        workers = PlayedWorkers([PlayedWorker(hub, iid, events, inboxes[iid]) for iid, hub in hubs.items()])
        workers.until(lambda: all(worker.registered for worker in workers.workers))
        orders.send(None)
        while True:
            while not orders.poll():
                workers.turn(0.02)
            if (order := orders.recv()) is None:
                return
            orders.send(workers.serve(*order))
