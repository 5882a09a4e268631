"""A broker as tests drive it, with its edge; what clients ask, and are answered."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from msgspec.structs import replace

from tests.core.build import PHASES, ready
from tests.core.reading import Told, only
from tetri.core.actions import Action, Detokenize, Detokenized, FromClient, Reply, Send, Submitted
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.policy.rules import Rules
from tetri.request import AskedSampling, Slo
from tetri.wire.clients import Attach, Cancel, Done, EndRequest, Inspect, Refused, Status
from tetri.wire.events import PeerUp
from tetri.wire.messages import Assign

RID = "r1"  # of the first request of a broker made here
SECRET, ANOTHERS = "s" * 32, "a" * 32  # of the client, and of another one
NO_LIMITS = Slo()
LIMITS: dict[str, Any] = {
    "context": 40,
    "vocabulary": 100,
    "heartbeat_s": 0.1,
    "dead_s": 5.0,
    "patience_s": 10.0,
    "client_grace_s": 2.0,
    "retry_s": 0.05,
    "quiet_s": 1e6,
}


class Serving(Told):
    """A broker's core with an edge: token n reads as the n-th letter; `stops` names the rids whose stop text
    is found, and how many of their tokens count then. While `edge` is False nothing is turned into text."""

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self.stops: dict[str, int] = {}
        self.edge = True

    def tell(self, *events: Any) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            if isinstance(event, Submitted):  # live, ids are random; here those of accepted requests count up
                event = replace(event, rid=f"r{self.core.counters['accepted'] + 1}")
            actions += super().tell(event)
        return actions

    def result(self, action: Action) -> Any:
        if not (isinstance(action, Detokenize) and self.edge):
            return None
        text = "".join(chr(97 + token % 26) for token in action.ids)
        return Detokenized(action.rid, action.start, action.ids, text, self.stops.get(action.rid), action.final)

    def status(self) -> Status:
        (reply,) = replies(self.tell(FromClient(b"inspector", Inspect())), b"inspector")
        assert isinstance(reply, Status)
        return reply

    def roles(self) -> dict[str, str]:
        return {each.iid: each.role for each in self.status().instances}


def serving(*workers: Any, rules: Rules | None = None, limits: dict[str, Any] | None = None, **changes: Any) -> Serving:
    """A broker with these workers, whose role is told by their first letter: an iid, or (iid, changes of Ready)."""
    made = Limits(**{**LIMITS, **(limits or {})})
    core = Broker(made, rules or Rules(), **{"epoch": 42, "rng": Random(1), "now": 0.0, "model": "m", **changes})
    told = Serving(core)
    for worker in workers:
        iid, fields = (worker, {}) if isinstance(worker, str) else worker
        told.tell(ready(iid, PHASES[iid[0]], **fields), PeerUp(iid))
    return told


def submit(
    key: str = "k",
    prompt: Iterable[int] = (1, 2, 3),
    client: bytes = b"c",
    deadline_s: float | None = None,
    secret: str = SECRET,
    n: int = 1,
    default_tokens: int = 128,
    slo: Slo = NO_LIMITS,
    **sampling: Any,
) -> Submitted:
    drawn = {"temperature": 1.0, "seed": 5} if n > 1 else {}
    asked = (tuple(prompt), AskedSampling(**{"max_tokens": 4, **drawn, **sampling}), deadline_s)
    content = repr((asked, n, default_tokens, slo)).encode()
    return Submitted(client, key, secret, content, f"of {key}", *asked, n=n, default_tokens=default_tokens, slo=slo)


def cancel(rid: str = RID, client: bytes = b"c", secret: str = SECRET) -> FromClient:
    return FromClient(client, Cancel(rid=rid, secret=secret))


def attach(start: int, rid: str = RID, client: bytes = b"c", secret: str = SECRET, choice: int = 0) -> FromClient:
    return FromClient(client, Attach(rid=rid, secret=secret, start=start, choice=choice))


def end(rid: str = RID) -> FromClient:
    return FromClient(b"operator", EndRequest(rid=rid))


def replies(actions: Iterable[Action], client: bytes = b"c") -> list[Any]:
    return [action.message for action in only(actions, Reply) if action.client == client]


def done(actions: Iterable[Action], client: bytes = b"c") -> Done:
    (found,) = [reply for reply in replies(actions, client) if isinstance(reply, Done)]
    return found


def refusal(actions: Iterable[Action]) -> str:
    (found,) = replies(actions)
    assert isinstance(found, Refused)
    return found.reason


def assigned(actions: Iterable[Action]) -> list[tuple[str, str, int]]:
    """Which requests go where, in which attempt."""
    sends = [action for action in actions if isinstance(action, Send) and isinstance(action.message, Assign)]
    return [(send.peer, send.message.rid, send.message.attempt) for send in sends]
