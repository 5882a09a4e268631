"""Small makers of what cores are told, and of what they say in short: tests read as lists of events and actions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tetri.core.actions import Action, Detokenize, Detokenized, Free, Freed, Send
from tetri.core.instance.identity import Identity
from tetri.instance import Instance
from tetri.policy.rules import Rules
from tetri.request import Capacity, Fingerprint, Reach, Sampling, blocks_for
from tetri.wire.handover import Chunk, Drop, Grant, Handle, Landed, Offer, Refuse
from tetri.wire.messages import (
    Assign,
    ClusterView,
    End,
    Failed,
    Heartbeat,
    Hold,
    InstanceLoad,
    Load,
    Membership,
    Ready,
    Receipt,
    Staged,
    TokenItem,
    Tokens,
)

BLOCK = 4  # tokens
FINGERPRINT = Fingerprint(
    engine="emulated",
    version="1",
    isa="any",
    model="m",
    weights="w",
    dtype="u8",
    kv_dtype="u8",
    block_tokens=BLOCK,
    block_bytes=32,
    layers=1,
    kv_heads=1,
    head_dim=8,
)
CAPACITY = Capacity(blocks=10, block_tokens=BLOCK, chunk_tokens=8, max_batch=2, context=40)
IDLE = Load(free_blocks=10)
FIRST = Rules(decode_route="first_fit")  # so that a test can tell who is asked


def capacity(**changes: int) -> Capacity:
    return Capacity(**{**{name: getattr(CAPACITY, name) for name in CAPACITY.__struct_fields__}, **changes})


def fingerprint(**changes: Any) -> Fingerprint:
    return Fingerprint(**{**{name: getattr(FINGERPRINT, name) for name in FINGERPRINT.__struct_fields__}, **changes})


def reach(iid: str, **changes: Any) -> Reach:
    """As of a process on the one host that all share."""
    return Reach(**{"paths": ["shm"], "host": "h", "process": 0, "segment": f"s-{iid}", **changes})


def identity(iid: str, role: str, **changes: Any) -> Identity:
    """`changes` are of the settings or of the instance."""
    of_instance = {name: changes.pop(name) for name in list(changes) if name in Instance.__struct_fields__}
    fields: dict[str, Any] = {
        "slots": 8,
        "rules": FIRST,
        "heartbeat_s": 0.1,
        "load_s": 1e6,  # tests of loads ask for them
        "offer_s": 1.0,
        "patience_s": 10.0,
        "view_s": 2.0,
    }
    return Identity(instance(iid, role, **of_instance), **{**fields, **changes})


# ---------------------------------------------------------------- from workers


def ready(iid: str, role: str, incarnation: int = 1, load: Load = IDLE, **changes: Any) -> Ready:
    return Ready(instance=instance(iid, role, incarnation, **changes), load=load)


def heartbeat(iid: str, *holds: Hold, incarnation: int = 1) -> Heartbeat:
    return Heartbeat(iid=iid, incarnation=incarnation, role="any", load=Load(free_blocks=7), holds=list(holds))


def staged(iid: str, rid: str, stage: Any, attempt: int = 1) -> Staged:
    return Staged(iid=iid, incarnation=1, rid=rid, attempt=attempt, stage=stage)


def tokens(iid: str, rid: str, start: int, *ids: int, attempt: int = 1, reason: str | None = None) -> Tokens:
    """The last of them ended the request if there is a reason."""
    receipt = Receipt(prompt_tokens=3, adopted=3, prefill_instance="p1", decode_instance=iid)
    end = End(reason=reason, receipt=receipt) if reason else None
    return Tokens(iid=iid, incarnation=1, items=[TokenItem(rid, attempt, start, list(ids), end)])


def failed(iid: str, rid: str, *, retry: bool, attempt: int = 1) -> Failed:
    return Failed(iid=iid, incarnation=1, rid=rid, attempt=attempt, why="oh no", retry=retry)


# ---------------------------------------------------------------- to workers


def instance(iid: str, role: str, incarnation: int = 1, **changes: Any) -> Instance:
    fields = {"inbox": f"at-{iid}", "fingerprint": FINGERPRINT, "capacity": CAPACITY, "reach": reach(iid)}
    return Instance(iid=iid, incarnation=incarnation, role=role, **{**fields, **changes})


def membership(number: int, *instances: Instance, epoch: int = 1) -> Membership:
    return Membership(epoch=epoch, number=number, instances=list(instances))


def view(number: int, epoch: int = 1, **free_blocks: int) -> ClusterView:
    """A ClusterView in which each instance has so many free blocks."""
    loads = [InstanceLoad(iid, 1, "decode", 0.0, Load(free_blocks=free)) for iid, free in free_blocks.items()]
    return ClusterView(epoch=epoch, number=number, loads=loads)


def assign(rid: str, prompt: int, output: Iterable[int] = (), attempt: int = 1, max_tokens: int = 8) -> Assign:
    """A request of `prompt` tokens."""
    sampling = Sampling(max_tokens=max_tokens)
    return Assign(rid=rid, attempt=attempt, prompt=[1] * prompt, output=list(output), sampling=sampling)


def offer(rid: str, prompt: int, output: Iterable[int] = (), **changes: Any) -> Offer:
    output = list(output)
    fields = {
        "src": "p1",
        "incarnation": 1,
        "attempt": 1,
        "offer": 1,
        "fingerprint": FINGERPRINT,
        "sampling": Sampling(max_tokens=8),
        "blocks": blocks_for(prompt + len(output), BLOCK),
    }
    return Offer(rid=rid, prompt=[1] * prompt, output=output, **{**fields, **changes})


def handle(*slots: int, segment: str = "s-p1") -> Handle:
    return Handle(segment=segment, slots=list(slots), generations=[1] * len(slots), block_bytes=32)


def chunk(rid: str, index: int, start: int, stop: int, token: int | None = None, **changes: Any) -> Chunk:
    """Blocks [start, stop), in the slots of the same numbers."""
    made = handle(*range(start, stop), segment=f"s-{changes.get('src', 'p1')}")
    fields = {"src": "p1", "incarnation": 1, "attempt": 1, "offer": 1, "handle": made}
    return Chunk(rid=rid, index=index, start=start, stop=stop, digest=9, token=token, **{**fields, **changes})


def drop(rid: str, **changes: Any) -> Drop:
    return Drop(rid=rid, why="no", **{"src": "p1", "incarnation": 1, "attempt": 1, "offer": 1, **changes})


def grant(rid: str, number: int = 1, src: str = "d1", attempt: int = 1) -> Grant:
    return Grant(src=src, incarnation=1, rid=rid, attempt=attempt, offer=number)


def refuse(rid: str, number: int = 1, src: str = "d1", attempt: int = 1) -> Refuse:
    return Refuse(src=src, incarnation=1, rid=rid, attempt=attempt, offer=number, why="full")


def landed(rid: str, index: int, number: int = 1, src: str = "d1", attempt: int = 1) -> Landed:
    return Landed(src=src, incarnation=1, rid=rid, attempt=attempt, offer=number, index=index)


# ---------------------------------------------------------------- reading actions


def sent(actions: Iterable[Action], peer: str | None = None, kind: type | None = None) -> list[Any]:
    """The messages sent, to one peer, of one kind."""
    messages = [a for a in actions if isinstance(a, Send) and peer in (None, a.peer)]
    return [a.message for a in messages if kind is None or isinstance(a.message, kind)]


def kinds(actions: Iterable[Action]) -> list[str]:
    """What each action is, in a word; of what is sent, the message and to whom."""
    return [f"{type(a.message).__name__} > {a.peer}" if isinstance(a, Send) else type(a).__name__ for a in actions]


def only(actions: Iterable[Action], kind: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


class Told:
    """A core that is told events at a time that tests move on. `check()` after every one."""

    def __init__(self, core: Any) -> None:
        self.core, self.now = core, 0.0

    def tell(self, *events: Any) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            actions += self._follow(self.core.handle(event, self.now))
            self.core.check()
        return actions

    def later(self, seconds: float = 0.0) -> list[Action]:
        """Time goes on, and the loop ticks."""
        self.now += seconds
        actions = self._follow(self.core.tick(self.now))
        self.core.check()
        return actions

    def _follow(self, actions: list[Action]) -> list[Action]:
        """What the loop would do at once: its results go back into the core."""
        followed: list[Action] = []
        for action in actions:
            followed.append(action)
            result = self.result(action)
            if result is not None:
                followed += self._follow(self.core.handle(result, self.now))
        return followed

    def result(self, action: Action) -> Any:
        """The event that an action has at once, if any."""
        return Freed(len(action.handle.slots)) if isinstance(action, Free) else None


class WordingTold(Told):
    """A broker's core with an edge: token n reads as the n-th letter; `stops` names the rids whose stop text
    is found, and how many of their tokens count then."""

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self.stops: dict[str, int] = {}

    def result(self, action: Action) -> Any:
        if not isinstance(action, Detokenize):
            return None
        text = "".join(chr(97 + token % 26) for token in action.ids)
        return Detokenized(action.rid, action.start, action.ids, text, self.stops.get(action.rid), action.final)
