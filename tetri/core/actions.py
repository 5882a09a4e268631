"""What a core says (actions) and what it is told beside messages (events). The loops in proc/, and the
simulator, carry the actions out."""

from __future__ import annotations

from tetri.engine_request import EngineRequest, StepDone
from tetri.request import LengthDistribution, LengthRange, Reach, Sampling, Value
from tetri.wire.clients import BrokerReply, ClientMessage
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Handle
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport, WorkerEvent

BROKER = "broker"  # the broker's name as a peer


class Broken(AssertionError):
    """An invariant does not hold: the process must not go on."""


# ---------------------------------------------------------------- actions of every core


class Send(Value, frozen=True):
    """To a peer's inbox, or to the broker's events. Best effort: nothing relies on one message arriving."""

    peer: str
    message: InboxMessage | WorkerEvent


class Connect(Value, frozen=True):
    peer: str
    address: str
    reach: Reach | None = None  # of another worker: how its KV can be read


class Disconnect(Value, frozen=True):
    peer: str


# ---------------------------------------------------------------- actions of a broker


class Reply(Value, frozen=True):
    """To a client; when it cannot be delivered, `Undelivered` comes back."""

    client: bytes
    message: BrokerReply


class Detokenize(Value, frozen=True):
    """Turn output tokens into text, in order; `Detokenized` comes back. `final`: nothing follows, release all."""

    rid: str
    start: int
    ids: tuple[int, ...]
    stop: tuple[str, ...]
    final: bool


class Release(Value, frozen=True):
    """The request has ended: forget its text."""

    rid: str


# ---------------------------------------------------------------- actions of a worker


class AddRequest(Value, frozen=True):
    request: EngineRequest


class CancelRequest(Value, frozen=True):
    key: str


class AdmitRequest(Value, frozen=True):
    key: str
    token: int


class Step(Value, frozen=True):
    """Run the engine: one forward pass or, when only decodes run, up to `most` in one go, fewer when one of them
    ends, memory runs out or a message waits. `StepDone` comes back."""

    most: int = 1


class HoldRequest(Value, frozen=True):
    """Keep a prefill leg out of the coming steps, or let it in again. It keeps its blocks."""

    key: str
    held: bool


class Predict(Value, frozen=True):
    """Name a range for the output length of a request; `LengthKnown` comes back, perhaps much later."""

    key: str
    prompt: tuple[int, ...]
    sampling: Sampling


class Publish(Value, frozen=True):
    """To everyone who subscribes to this process. The last one wins; any may be lost."""

    message: LoadReport | ClusterView


class Export(Value, frozen=True):
    """Copy a leg's blocks [start, stop) into the KV store; `Exported` comes back."""

    key: str
    index: int
    start: int
    stop: int


class Adopt(Value, frozen=True):
    """Take a chunk out of the slab of `peer`, over this path, into a leg's blocks from `start` on; `Adopted` comes
    back."""

    key: str
    index: int
    start: int
    handle: Handle
    digest: int | None
    peer: str
    path: str


class Free(Value, frozen=True):
    """Give a chunk's slots in the own KV store back; `Freed` comes when nobody reads or writes them any more."""

    handle: Handle


# ---------------------------------------------------------------- events


class FromClient(Value, frozen=True):
    """Any client message but Submit, which comes as `Submitted`."""

    client: bytes
    message: ClientMessage


class Submitted(Value, frozen=True):
    """A Submit whose prompt the edge has turned into token ids."""

    client: bytes
    key: str
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline_s: float | None = None


class Detokenized(Value, frozen=True):
    """`text` may be shown. `counted`: a stop text was found, only so many output tokens count; else None."""

    rid: str
    start: int
    ids: tuple[int, ...]
    text: str
    counted: int | None
    final: bool


class Undelivered(Value, frozen=True):
    """A Reply was not taken. `gone`: the client has left; otherwise its queue is full."""

    client: bytes
    message: BrokerReply
    gone: bool


class RequestRejected(Value, frozen=True):
    """The engine can never run this leg."""

    key: str
    why: str


class LengthKnown(Value, frozen=True):
    """What was predicted for the output of a request (all its output, earlier attempts included): a range as it is to
    be used, or odds, from which the core makes one; neither when nobody can say."""

    key: str
    length: LengthRange | None
    distribution: LengthDistribution | None = None


class Exported(Value, frozen=True):
    key: str
    index: int
    start: int
    stop: int
    handle: Handle
    digest: int | None


class Freed(Value, frozen=True):
    """So many slots of the own KV store are free again."""

    slots: int


class Adopted(Value, frozen=True):
    """`problem` is None when the chunk is in the engine's own memory with the right digest; else "flipped" (the bytes
    are not those of the digest), "truncated" (they are fewer than announced), "foreign" (the handle is not of the
    sender's slab) or "lost" (they are no longer there, or cannot be reached)."""

    key: str
    index: int
    problem: str | None = None


Action = (
    Send
    | Connect
    | Disconnect
    | Reply
    | Detokenize
    | Release
    | AddRequest
    | CancelRequest
    | AdmitRequest
    | Step
    | HoldRequest
    | Predict
    | Publish
    | Export
    | Adopt
    | Free
)
BrokerInput = FromClient | Submitted | Detokenized | Undelivered | PeerUp | PeerDown | WorkerEvent | ClusterView
MonitorInput = LoadReport | PeerUp | PeerDown
WorkerInput = (
    InboxMessage
    | ClusterView
    | PeerUp
    | PeerDown
    | RequestRejected
    | LengthKnown
    | Exported
    | Adopted
    | Freed
    | StepDone
)
