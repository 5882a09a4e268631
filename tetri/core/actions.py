"""What a core says (actions) and what it is told beside messages (events). The loops in proc/, and the
simulator, carry the actions out."""

from __future__ import annotations

from dataclasses import dataclass

from tetri.leg import Leg, StepDone
from tetri.request import LengthRange, Sampling
from tetri.wire.clients import BrokerReply, ClientMessage
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import ClusterView, Handle, InboxMessage, LoadReport, WorkerEvent

BROKER = "broker"  # the broker's name as a peer


class Broken(AssertionError):
    """An invariant does not hold: the process must not go on."""


# ---------------------------------------------------------------- actions of every core


@dataclass(frozen=True, slots=True)
class Send:
    """To a peer's inbox, or to the broker's events. Best effort: nothing relies on one message arriving."""

    peer: str
    message: InboxMessage | WorkerEvent


@dataclass(frozen=True, slots=True)
class Connect:
    peer: str
    address: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    peer: str


# ---------------------------------------------------------------- actions of a broker


@dataclass(frozen=True, slots=True)
class Reply:
    """To a client; when it cannot be delivered, `Undelivered` comes back."""

    client: bytes
    message: BrokerReply


@dataclass(frozen=True, slots=True)
class Word:
    """Turn output tokens into text, in order; `Worded` comes back. `final`: nothing follows, release all."""

    rid: str
    start: int
    ids: tuple[int, ...]
    stop: tuple[str, ...]
    final: bool


@dataclass(frozen=True, slots=True)
class Unword:
    """The request has ended: forget its text."""

    rid: str


# ---------------------------------------------------------------- actions of a worker


@dataclass(frozen=True, slots=True)
class AddLeg:
    leg: Leg


@dataclass(frozen=True, slots=True)
class CancelLeg:
    key: str


@dataclass(frozen=True, slots=True)
class AdmitLeg:
    key: str
    token: int


@dataclass(frozen=True, slots=True)
class Step:
    """Run the engine: one forward pass or, when only decodes run, up to `most` in one go, fewer when one of them
    ends, memory runs out or a message waits. `StepDone` comes back."""

    most: int = 1


@dataclass(frozen=True, slots=True)
class HoldLeg:
    """Keep a prefill leg out of the coming steps, or let it in again. It keeps its blocks."""

    key: str
    held: bool


@dataclass(frozen=True, slots=True)
class Predict:
    """Name a range for the output length of a request; `LengthKnown` comes back, perhaps much later."""

    key: str
    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Publish:
    """To everyone who subscribes to this process. The last one wins; any may be lost."""

    message: LoadReport | ClusterView


@dataclass(frozen=True, slots=True)
class Export:
    """Copy a leg's blocks [start, stop) into the KV store; `Exported` comes back."""

    key: str
    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take a chunk out of the sender's store into a leg's blocks from `start` on; `Adopted` comes back."""

    key: str
    index: int
    start: int
    handle: Handle
    digest: int | None


@dataclass(frozen=True, slots=True)
class Free:
    """Give a chunk's slots in the own KV store back."""

    handle: Handle


@dataclass(frozen=True, slots=True)
class Forget:
    """A peer's store is gone: close what was opened of it."""

    segment: str


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class FromClient:
    """Any client message but Submit, which comes as `Submitted`."""

    client: bytes
    message: ClientMessage


@dataclass(frozen=True, slots=True)
class Submitted:
    """A Submit whose prompt the edge has turned into token ids."""

    client: bytes
    key: str
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Worded:
    """`text` may be shown. `counted`: a stop text was found, only so many output tokens count; else None."""

    rid: str
    start: int
    ids: tuple[int, ...]
    text: str
    counted: int | None
    final: bool


@dataclass(frozen=True, slots=True)
class Undelivered:
    """A Reply was not taken. `gone`: the client has left; otherwise its queue is full."""

    client: bytes
    message: BrokerReply
    gone: bool


@dataclass(frozen=True, slots=True)
class LegRejected:
    """The engine can never run this leg."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class LengthKnown:
    """What was predicted for the output of a request (all its output, earlier attempts included)."""

    key: str
    length: LengthRange


@dataclass(frozen=True, slots=True)
class Exported:
    key: str
    index: int
    start: int
    stop: int
    handle: Handle
    digest: int | None


@dataclass(frozen=True, slots=True)
class Adopted:
    """`problem` is None when the chunk is in the engine's own memory with the right digest; else "corrupt" (the
    bytes are not what was announced) or "lost" (they are no longer there)."""

    key: str
    index: int
    problem: str | None = None


Action = (
    Send
    | Connect
    | Disconnect
    | Reply
    | Word
    | Unword
    | AddLeg
    | CancelLeg
    | AdmitLeg
    | Step
    | HoldLeg
    | Predict
    | Publish
    | Export
    | Adopt
    | Free
    | Forget
)
BrokerInput = FromClient | Submitted | Worded | Undelivered | PeerUp | PeerDown | WorkerEvent
MonitorInput = LoadReport | PeerUp | PeerDown
WorkerInput = InboxMessage | ClusterView | PeerUp | PeerDown | LegRejected | LengthKnown | Exported | Adopted | StepDone
