"""The clients of the virtual cluster (tests/core/cluster.py). They check all that they are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.core.nodes import EDGE, TOKEN_BYTES, VOCABULARY
from tetri.core.actions import FromClient, Submitted
from tetri.engine.emulated import reference
from tetri.request import Receipt, Sampling
from tetri.text import Stopper
from tetri.wire.clients import Accepted, Attach, Cancel, ChangeRole, Delta, Done, Refused, RoleChanged

if TYPE_CHECKING:
    from tests.core.cluster import Cluster


@dataclass
class Client:
    """One client with one request. What it is told must be in order, without gaps and without repetition."""

    world: Cluster
    name: bytes
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline_s: float | None = None
    rid: str | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    done: Done | None = None
    cancelled: bool = False
    away: bool = False
    stuck: bool = False
    heard_at: float = 0.0
    asked: list[int] = field(default_factory=list)  # tokens from which on it asked to hear all again
    expected: int = 0  # the next token that may come
    tail_at: int = -1  # the token at which text without tokens came

    def submit(self) -> None:
        if self.rid is None:
            self.say(Submitted(self.name, self.name.decode(), self.prompt, self.sampling, self.deadline_s))
            self.world.after(0.3, self.submit)

    def say(self, event: Any) -> None:
        broker = self.world.broker
        self.world.after(self.world.rng.uniform(0.0, 0.002), lambda: broker.receive(event))

    def watch(self) -> None:
        """Ask when nothing was heard for a while, as a client's library does."""
        if self.done is not None:
            return
        if self.rid is not None and not self.away and self.world.now - self.heard_at > 0.5:
            self.attach()
        self.world.after(0.4, self.watch)

    def cancel(self) -> None:
        if self.rid is not None and self.done is None:
            self.cancelled = True
            self.say(FromClient(self.name, Cancel(rid=self.rid)))

    def leave(self) -> None:
        self.away = True
        self.world.after(self.world.rng.uniform(0.01, 0.8), self.back)

    def back(self) -> None:
        self.away = False
        if self.rid is not None and self.done is None:
            self.attach()

    def attach(self) -> None:
        assert self.rid is not None
        self.asked.append(len(self.ids))
        self.say(FromClient(self.name, Attach(rid=self.rid, start=len(self.ids))))

    def choke(self) -> None:
        self.stuck = True

        def breathe() -> None:
            self.stuck = False

        self.world.after(self.world.rng.uniform(0.01, 0.2), breathe)

    def hear(self, message: Any) -> str:
        if self.away or self.stuck:
            return "gone" if self.away else "full"
        self.heard_at = self.world.now
        match message:
            case Accepted():
                assert message.key == self.name.decode() and self.rid in (None, message.rid)
                if self.rid is not None:
                    self.asked.append(0)
                self.rid = message.rid
            case Delta() if message.rid == self.rid:
                self._extend(message)
            case Done() if message.rid == self.rid:
                if self.expected == message.usage.completion_tokens:
                    assert self.done in (None, message) and (self.done is None or self.asked or self.cancelled)
                    self.done = message
            case Refused():
                raise AssertionError(f"{self.name!r} is refused: {message}")
        return "sent"

    def _extend(self, delta: Delta) -> None:
        """Nothing comes twice, out of order or after the end, unless it was asked for again."""
        assert self.done is None or self.asked, f"{self.name!r} hears {delta} after the end"
        if delta.start != self.expected:
            assert delta.start in self.asked, f"{self.name!r} has {self.ids} and hears {delta}"
            self.expected = delta.start
        again = self.ids[delta.start : delta.start + len(delta.ids)]
        assert again == delta.ids[: len(again)], f"{self.name!r} has {self.ids} and hears {delta}"
        assert len(again) in (0, len(delta.ids)), f"{self.name!r} has a part of {delta}"
        self.expected += len(delta.ids)
        if delta.ids and again:
            return
        if not delta.ids:
            if not delta.text or self.tail_at == delta.start:
                return
            self.tail_at = delta.start
        self.ids += delta.ids
        self.text += delta.text

    def verify(self) -> None:
        """The tokens are the right ones, all of them unless the request was broken off."""
        done = self.done
        assert done is not None
        right = reference(self.prompt, self.sampling, VOCABULARY, TOKEN_BYTES)
        stopper = Stopper(EDGE, self.sampling.stop)
        released = stopper.feed(right)
        text = released.text + stopper.finish().text
        right = right[: released.counted] if released.stopped else right
        assert done.usage.completion_tokens == len(self.ids)
        assert abs(sum(done.timeline.values()) - done.jct_s) < 1e-6, done
        if done.reason == "cancelled":
            assert self.cancelled or self.world.faults.away
        if done.reason in ("cancelled", "deadline"):
            assert self.ids == right[: len(self.ids)]
            return
        assert (self.ids, self.text) == (right, text)
        ended = released.stopped or (right[-1] == 0 and not self.sampling.ignore_eos)
        assert done.reason == ("stop" if ended else "length"), (done, right)
        assert done.error is None and done.receipt.prompt_tokens == len(self.prompt)
        if not released.stopped:  # else the broker may have ended it
            self._verify_receipt(done.receipt)

    def _verify_receipt(self, receipt: Receipt) -> None:
        """Its worker said what became of the KV, whoever died when."""
        if receipt.decode_instance is None:  # the first token of an attempt was its last
            assert (receipt.adopted, receipt.transport) == (0, "none"), receipt
        else:
            assert receipt.adopted == len(self.prompt) and receipt.transport in ("local", "stream"), receipt


@dataclass
class Admin:
    """Somebody who changes roles, and is told what became of it."""

    world: Cluster
    name: bytes = b"admin"
    asked: dict[str, tuple[str, str]] = field(default_factory=dict)  # key -> instance and role
    heard: list[Any] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def flip(self, iid: str, role: str) -> None:
        key = f"flip-{len(self.asked)}"
        self.asked[key] = (iid, role)
        self.world.broker.receive(FromClient(self.name, ChangeRole(key=key, iid=iid, role=role)))

    def hear(self, message: Any) -> str:
        assert isinstance(message, RoleChanged | Refused) and message.key in self.asked, message
        if isinstance(message, RoleChanged):
            assert (message.iid, message.role) == self.asked[message.key] and message.took_s >= 0
            worker, known = self.world.nodes[message.iid], self.world.broker.core.members.by_iid[message.iid]
            there = worker.alive and worker.core.own.incarnation == known.instance.incarnation
            if there and message.key not in self.told:
                assert worker.core.role == message.role, f"{message.iid} is {worker.core.role}, not {message.role}"
            self.told.append(message.key)
        self.heard.append(message)
        return "sent"
