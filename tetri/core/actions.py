"""The actions that a core returns, and the events that it receives besides messages. The loops in proc/ and the
simulator carry the actions out."""

from __future__ import annotations

from tetri.engine_request import EngineRequest, StepDone
from tetri.instance import Reach
from tetri.request import DEFAULT_TOKENS, AskedSampling, LengthDistribution, LengthRange, Sampling, Slo, Value
from tetri.wire.clients import BrokerReply, ClientMessage, OperatorMessage
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Handle
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport, WorkerEvent

BROKER = "broker"  # the broker's name as a peer


class Broken(AssertionError):
    """An invariant does not hold. The process must stop."""


# ---------------------------------------------------------------- actions of every core


class Send(Value, frozen=True):
    """Send a message to a worker's inbox, or a worker event to the broker. Best effort: any message may be lost."""

    peer: str
    message: InboxMessage | WorkerEvent


class Connect(Value, frozen=True):
    """Open a connection to a peer. `reach`: how the KV of another worker can be read; None for the broker."""

    peer: str
    address: str
    reach: Reach | None = None


class Disconnect(Value, frozen=True):
    """Close the connection to a peer."""

    peer: str


# ---------------------------------------------------------------- actions of a broker


class Reply(Value, frozen=True):
    """Send a message to a client. If it cannot be delivered, an `Undelivered` event follows."""

    client: bytes
    message: BrokerReply


class Detokenize(Value, frozen=True):
    """Turn output tokens of a choice into text; a `Detokenized` event follows. `rid`: id of the choice. `start`: index
    of the first token in the output. `final`: no more tokens follow, so hold no text back. `sampling`: its `stop` texts
    end the choice, once a token after the first `min_tokens` completes one; its `stop_token_ids` have no text."""

    rid: str
    start: int
    ids: tuple[int, ...]
    final: bool
    sampling: Sampling


class Release(Value, frozen=True):
    """Forget the text of a choice that has ended, by its id."""

    rid: str


# ---------------------------------------------------------------- actions of a worker


class AddRequest(Value, frozen=True):
    """Add an engine request to the engine. A `RequestRejected` event follows if the engine can never run it."""

    request: EngineRequest


class CancelRequest(Value, frozen=True):
    """Remove an engine request and its KV blocks from the engine."""

    key: str


class AdmitRequest(Value, frozen=True):
    """Let a decode request whose KV has landed run. `token`: its first output token. `further`: those after it, of a
    request that was decoded elsewhere before."""

    key: str
    token: int
    further: tuple[int, ...] = ()


class StayRequest(Value, frozen=True):
    """Let a prefill request go on in this engine, as decode request `decode_key`, when its prefill ends: its KV stays
    where it is. A `RequestRejected` event follows if it cannot."""

    key: str
    decode_key: str


class Step(Value, frozen=True):
    """Run the engine; a `StepDone` event follows. One forward pass, or up to `most` in one go when only decodes run:
    fewer when a request ends, memory runs out or a message waits. `chunk`: most prompt tokens of the pass; None: as
    many as the budget of a step has left."""

    most: int = 1
    chunk: int | None = None


class HoldRequest(Value, frozen=True):
    """Keep a prefill request, or a request of the batch, out of the next steps, or let it run again. It keeps its KV
    blocks."""

    key: str
    held: bool


class Predict(Value, frozen=True):
    """Predict the output length of a request; a `LengthKnown` event follows, perhaps much later."""

    key: str
    prompt: tuple[int, ...]
    sampling: Sampling


class Publish(Value, frozen=True):
    """Publish a message to all subscribers of this process. A newer one replaces it; any may be lost."""

    message: LoadReport | ClusterView


class Export(Value, frozen=True):
    """Copy the KV blocks [start, stop) of an engine request into the slab, as chunk `index`. `Exported` follows."""

    key: str
    index: int
    start: int
    stop: int


class Adopt(Value, frozen=True):
    """Fetch KV chunk `index` of hand-over `key` from the slab of `peer` over `path`, once, into the blocks of each
    engine request of `keys` from `start` on. An `Adopted` event follows."""

    key: str
    index: int
    start: int
    handle: Handle
    digest: int | None
    peer: str
    path: str
    keys: tuple[str, ...]


class Free(Value, frozen=True):
    """Free the slots of a chunk in the own slab. `Freed` follows when they are no longer read or written."""

    handle: Handle


# ---------------------------------------------------------------- events


class FromClient(Value, frozen=True):
    """A message of a client or an operator, except Submit: that one arrives as `Submitted`."""

    client: bytes
    message: ClientMessage | OperatorMessage


class Submitted(Value, frozen=True):
    """A Submit whose prompt is tokenized. `key` and `secret` are drawn by the client. `content` identifies all that the
    Submit asks for: the same key means the same request only with the same content. `rid` is the id of the request, if
    it is a new one; nobody can guess it. `waited_s`: seconds since the Submit arrived, while its text was tokenized."""

    client: bytes
    key: str
    secret: str
    content: bytes
    rid: str
    prompt: tuple[int, ...]
    sampling: AskedSampling
    deadline_s: float | None = None
    waited_s: float = 0.0
    n: int = 1
    default_tokens: int = DEFAULT_TOKENS
    slo: Slo = Slo()


class Detokenized(Value, frozen=True):
    """The text of output tokens of a choice, ready for the client. `counted`: number of output tokens that count, when
    a stop text was found; else None."""

    rid: str
    start: int
    ids: tuple[int, ...]
    text: str
    counted: int | None
    final: bool


class Undelivered(Value, frozen=True):
    """A Reply could not be delivered. `gone`: the client has disconnected; otherwise its queue is full."""

    client: bytes
    message: BrokerReply
    gone: bool


class RequestRejected(Value, frozen=True):
    """The engine can never run this engine request."""

    key: str
    why: str


class LengthKnown(Value, frozen=True):
    """The predicted output length of a request, earlier attempts included: either a range to use as it is, or a
    distribution from which the core makes one. Neither: no prediction is possible."""

    key: str
    length: LengthRange | None
    distribution: LengthDistribution | None = None


class Exported(Value, frozen=True):
    """The KV blocks [start, stop) are in the slab. `digest` is None when the store computes none."""

    key: str
    index: int
    start: int
    stop: int
    handle: Handle
    digest: int | None


class Freed(Value, frozen=True):
    """Number of slots of the own slab that have become free."""

    slots: int


class Adopted(Value, frozen=True):
    """The result of a fetch. `problem` is None when the chunk is in the engine's blocks and its digest is right.
    Otherwise it is "flipped" (the digest is wrong), "truncated" (fewer bytes than announced), "foreign" (the handle is
    not from the sender's slab) or "lost" (the bytes are gone or unreachable). `missed`: those of `Adopt.keys` that have
    ended meanwhile; if all have, the chunk is "lost"."""

    key: str
    index: int
    problem: str | None = None
    missed: tuple[str, ...] = ()


NetworkAction = Send | Connect | Disconnect | Publish
BrokerAction = Reply | Detokenize | Release
EngineAction = AddRequest | CancelRequest | AdmitRequest | HoldRequest | StayRequest | Step | Predict
Action = NetworkAction | BrokerAction | EngineAction | Export | Adopt | Free
BrokerInput = FromClient | Submitted | Detokenized | Undelivered | PeerUp | PeerDown | WorkerEvent | ClusterView
MonitorInput = LoadReport | PeerUp | PeerDown
WorkerResult = RequestRejected | LengthKnown | Exported | Adopted | Freed | StepDone  # of the worker's own actions
WorkerInput = InboxMessage | ClusterView | PeerUp | PeerDown | WorkerResult
