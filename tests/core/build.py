"""Small makers of what cores hear, and of what they say in short: tests read as lists of events and actions. How a
message or an identity is made stands here alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tetri.core.decode.request import DecodeRequest, HandOver, KVInflow
from tetri.core.instance.identity import Identity
from tetri.core.prefill.request import KVOutflow, PrefillRequest, choices_of
from tetri.cost import Cost
from tetri.instance import Capacity, Fingerprint, Instance, Reach
from tetri.policy.rules import Rules
from tetri.policy.views import QueuedPrompt
from tetri.request import LengthRange, Receipt, Sampling, blocks_for
from tetri.wire.handover import Chunk, Defer, Drop, Grant, Handle, Landed, LengthUpdate, Offer, Refuse, Sibling
from tetri.wire.load import Load
from tetri.wire.messages import (
    Assign,
    Close,
    ClusterView,
    End,
    Failed,
    Flip,
    Heartbeat,
    Hold,
    InstanceLoad,
    LoadReport,
    Membership,
    Migrate,
    NotMigrated,
    Ready,
    Resend,
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


PHASES = {"p": "prefill", "d": "decode", "m": "mixed"}  # by the first letter of an instance here
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


def heartbeat(
    iid: str, *holds: Hold, role: str = "any", incarnation: int = 1, epoch: int = 42, read: int = 0, **changes: Any
) -> Heartbeat:
    """From a worker that has read the broker's messages before Membership `read`, by default not one Membership."""
    load = changes.pop("load", Load(free_blocks=7))
    own = {"iid": iid, "incarnation": incarnation, "role": role, "load": load}
    return Heartbeat(**own, holds=list(holds), epoch=epoch, read=read, **changes)


def report(iid: str, role: str, incarnation: int = 1, **load: Any) -> LoadReport:
    return LoadReport(iid=iid, incarnation=incarnation, role=role, load=Load(**{"free_blocks": 10, **load}))


def staged(iid: str, rid: str, stage: Any, attempt: int = 1) -> Staged:
    return Staged(iid=iid, incarnation=1, rid=rid, attempt=attempt, stage=stage)


def tokens(iid: str, rid: str, start: int, *ids: int, attempt: int = 1, reason: str | None = None) -> Tokens:
    """The last of them ended the request if there is a reason."""
    receipt = Receipt(prompt_tokens=3, adopted=3, prefill_instance="p1", decode_instance=iid)
    end = End(reason=reason, receipt=receipt) if reason else None
    return Tokens(iid=iid, incarnation=1, items=[TokenItem(rid, attempt, start, list(ids), end)])


def ending(iid: str, rid: str, start: int, *ids: int, reason: str = "length", attempt: int = 1) -> list[Any]:
    """The last tokens of a request, with its end."""
    return [tokens(iid, rid, start, *ids, reason=reason, attempt=attempt)]


def failed(iid: str, rid: str, *, retry: bool, attempt: int = 1, avoid: Iterable[str] = ()) -> Failed:
    return Failed(iid=iid, incarnation=1, rid=rid, attempt=attempt, why="oh no", retry=retry, avoid=[*avoid])


# ---------------------------------------------------------------- to workers


def instance(iid: str, role: str, incarnation: int = 1, **changes: Any) -> Instance:
    fields = {"inbox": f"at-{iid}", "fingerprint": FINGERPRINT, "capacity": CAPACITY, "reach": reach(iid)}
    return Instance(iid=iid, incarnation=incarnation, role=role, **{**fields, **changes})


def membership(
    number: int, *instances: Instance, epoch: int = 1, serial: int | None = None, **change: Any
) -> Membership:
    """A whole one, or a change with `since` and `gone`. By default the broker has sent none without a change."""
    serial = number if serial is None else serial
    return Membership(epoch=epoch, number=number, serial=serial, instances=list(instances), **change)


def view(number: int, epoch: int = 1, **free_blocks: int | Load) -> ClusterView:
    """A ClusterView in which each instance has so many free blocks, or such a load."""
    given = {iid: load if isinstance(load, Load) else Load(free_blocks=load) for iid, load in free_blocks.items()}
    loads = [InstanceLoad(iid, 1, "decode", 0.0, load) for iid, load in given.items()]
    return ClusterView(epoch=epoch, number=number, loads=loads)


def assign(
    rid: str, prompt: int, output: Iterable[int] = (), attempt: int = 1, max_tokens: int = 8, **changes: Any
) -> Assign:
    """A request of `prompt` tokens; `changes` of its sampling, what to `avoid`, the `siblings` by their ids, and where
    it is `pinned` to."""
    avoid, made = [*changes.pop("avoid", ())], siblings(*changes.pop("siblings", ()))
    fields = {"prompt": [1] * prompt, "output": list(output), "avoid": avoid, "siblings": made}
    fields["pinned"] = changes.pop("pinned", "")
    return Assign(rid=rid, attempt=attempt, sampling=Sampling(max_tokens=max_tokens, **changes), **fields)


def siblings(*rids: str) -> list[Sibling]:
    """In their first attempt, with seeds from 1 on."""
    return [Sibling(rid, 1, seed) for seed, rid in enumerate(rids, 1)]


def offer(rid: str, prompt: int, output: Iterable[int] = (), max_tokens: int = 8, **changes: Any) -> Offer:
    output = list(output)
    fields = {
        "src": "p1",
        "incarnation": 1,
        "attempt": 1,
        "offer": 1,
        "fingerprint": FINGERPRINT,
        "sampling": Sampling(max_tokens=max_tokens),
        "blocks": blocks_for(prompt + len(output), BLOCK),
    }
    return Offer(rid=rid, prompt=[1] * prompt, output=output, **{**fields, **changes})


def handle(*slots: int, segment: str = "s-p1") -> Handle:
    return Handle(segment=segment, slots=list(slots), generations=[1] * len(slots), block_bytes=32)


def chunk(rid: str, index: int, start: int, stop: int, token: int | None = None, **changes: Any) -> Chunk:
    """Blocks [start, stop), in the slots of the same numbers. `token`: the first one, of a single choice."""
    made = handle(*range(start, stop), segment=f"s-{changes.get('src', 'p1')}")
    tokens = [] if token is None else [token]
    fields = {"src": "p1", "incarnation": 1, "attempt": 1, "offer": 1, "handle": made, "tokens": tokens}
    return Chunk(rid=rid, index=index, start=start, stop=stop, digest=9, **{**fields, **changes})


def drop(rid: str, **changes: Any) -> Drop:
    return Drop(rid=rid, why="no", **{"src": "p1", "incarnation": 1, "attempt": 1, "offer": 1, **changes})


def close(rid: str, attempt: int = 1, reason: str = "", outputs: int = 0) -> Close:
    return Close(rid=rid, attempt=attempt, reason=reason, outputs=outputs)


def migrate(rid: str, to: str = "d2", number: int = 2, attempt: int = 1) -> Migrate:
    return Migrate(rid=rid, attempt=attempt, to=to, next=number)


def not_migrated(iid: str, rid: str, number: int = 2, attempt: int = 1, *, held: bool = False) -> NotMigrated:
    return NotMigrated(iid=iid, incarnation=1, rid=rid, attempt=attempt, next=number, why="no", held=held)


def resend(rid: str, start: int, attempt: int = 1) -> Resend:
    return Resend(rid=rid, attempt=attempt, start=start)


def flip(role: str, number: int = 8) -> Flip:
    return Flip(role=role, number=number)


def update_length(rid: str, length: LengthRange, **changes: Any) -> LengthUpdate:
    return LengthUpdate(rid=rid, length=length, **{"src": "p1", "incarnation": 1, "attempt": 1, "offer": 1, **changes})


def grant(rid: str, number: int = 1, src: str = "d1", attempt: int = 1) -> Grant:
    return Grant(src=src, incarnation=1, rid=rid, attempt=attempt, offer=number)


def defer(rid: str, number: int = 1, src: str = "d1", attempt: int = 1) -> Defer:
    return Defer(src=src, incarnation=1, rid=rid, attempt=attempt, offer=number)


def refuse(rid: str, number: int = 1, src: str = "d1", attempt: int = 1, **changes: Any) -> Refuse:
    why = changes.pop("why", "full")
    return Refuse(src=src, incarnation=1, rid=rid, attempt=attempt, offer=number, why=why, **changes)


def unread(rid: str, number: int = 1, src: str = "d1", attempt: int = 1, corrupt: bool = False) -> Refuse:
    """It could not read a chunk."""
    why = f"chunk 0 is {'flipped' if corrupt else 'lost'}"
    return refuse(rid, number, src, attempt, why=why, unread=True, corrupt=corrupt)


def landed(rid: str, index: int, number: int = 1, src: str = "d1", attempt: int = 1) -> Landed:
    return Landed(src=src, incarnation=1, rid=rid, attempt=attempt, offer=number, index=index)


# ---------------------------------------------------------------- requests as the two phases keep them


def prefill_request(
    made: Assign, arrival: int = 1, cost: Cost | None = None, since: float = 0.0, due: float | None = None
) -> PrefillRequest:
    """Of one that was assigned, by its id as key."""
    tokens = len(made.prompt) + len(made.output)
    work_s = (cost or Cost()).prompt_s(tokens, 0, 8)
    queued = QueuedPrompt(made.rid, arrival, tokens, since, work_s, due)
    prompt, output, flow = tuple(made.prompt), tuple(made.output), KVOutflow(blocks_for(tokens, BLOCK))
    fields = (prompt, output, made.sampling, queued, flow, tokens, work_s)
    return PrefillRequest(made.rid, choices_of(made), *fields)


def decode_request(made: Offer) -> DecodeRequest:
    """Of one that was offered, by its id as key. Its KV comes through shared memory."""
    flow = KVInflow(made.blocks, "shm", f"s-{made.src}")
    return DecodeRequest(made.rid, made, flow, length=made.length, blocks=made.blocks)


def hand_over(made: Offer) -> HandOver:
    """Of one that was offered, with its only choice, by its id as key."""
    request = decode_request(made)
    return HandOver(made.rid, made, request.flow, {0: request})
