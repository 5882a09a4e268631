"""The messages between broker, workers and monitor: one union of tagged records per receiver. clients.py has the
messages of clients, handover.py those between two workers.

attempt      number of a request's attempt; the broker increments it at each restart
incarnation  random number, drawn once per process start; distinguishes a restarted worker from the earlier one
offer        number of one try to hand an attempt to one decode instance; the prefill instance counts them
"""

from __future__ import annotations

from msgspec import Struct

from tetri.instance import Instance
from tetri.request import Count, Name, PredictorStatus, Receipt, Record, Sampling, Slo, Stage, StepRatio, Token
from tetri.wire.handover import Chunk, Defer, Drop, Grant, Landed, LengthUpdate, Offer, Refuse, Sibling
from tetri.wire.load import Load
from tetri.wire.observation import Activity, EngineStep, TraceEvent

# ---- workers -> broker


class FromWorker(Record, frozen=True):
    """Base of the messages of a registered worker; `iid` and `incarnation` identify the sender."""

    iid: Name
    incarnation: int


class Hold(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request that a worker holds. `outputs`: number of output tokens that it knows, of all attempts."""

    rid: Name
    attempt: Count
    stage: Stage
    outputs: Count


class CostTable(Record, frozen=True):
    """The seconds of a worker's engine steps (docs/cost.md). `prefill`: [tokens of a chunk, seconds], `decode`:
    [requests of a batch, seconds], in ascending order. `prefill_start_s`: added per token of the chunk and token before
    it in its prompt; `decode_context_s`: added per token of context in the batch."""

    prefill: list[list[float]]
    decode: list[list[float]]
    prefill_start_s: float = 0.0
    decode_context_s: float = 0.0


class Ready(Record, tag="ready", frozen=True):
    """Registers a worker; the answer is a Membership that lists it. `cost`: what its steps take; None: not measured."""

    instance: Instance
    load: Load
    cost: CostTable | None = None


class Heartbeat(FromWorker, tag="heartbeat", frozen=True):
    """A worker's state, every `heartbeat_s`. `holds`: every request that it holds; None: not listed this time, since a
    long list is sent less often. `epoch` and `read`: epoch and serial of the last Membership that it has read, 0 before
    the first. What the broker sent before that one is read or lost; what it sent later may still be on its way, so
    `holds` tells nothing of it. `flip`: number of the last Flip that it has carried out, 0 before the first.
    `counters`: events of its KV receives since its process started, by name. `slots_used`: slots of its KV store that
    are not free. `predictor`: None if it does not learn output lengths. `unread_by`: decode instances that could not
    read its KV, and why; they get an offer from it now and then only. `step_ratio`: of its recent steps. `at`: when it
    was sent, on the worker's clock. `traced`: what has happened to its requests since the last heartbeat."""

    role: str
    load: Load
    holds: list[Hold] | None
    epoch: int
    read: Count
    flip: Count = 0
    counters: dict[str, Count] = {}
    slots_used: Count = 0
    predictor: PredictorStatus | None = None
    unread_by: dict[str, str] = {}
    step_ratio: StepRatio = StepRatio()
    at: float = 0.0
    activity: Activity = Activity()
    traced: list[TraceEvent] = []


class Staged(FromWorker, tag="staged", frozen=True):
    """A request entered PREFILL, MOVING, WAITING or DECODE on this worker. `peer`: the other instance of the
    hand-over, "" if there is none. `lost`: the decode instance that was lost and may have decoded it, "" if none was;
    the request goes on."""

    rid: Name
    attempt: Count
    stage: Stage
    peer: str = ""
    lost: Name = ""


class End(Record, frozen=True):
    """The end of a request, as its worker reports it. `reason`: stop, length or error; `error` explains the last."""

    reason: str
    receipt: Receipt
    error: str | None = None


class TokenItem(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Output tokens of one request from index `start` on; index 0 is the first token after the prompt. `end`: set if
    the last of these tokens ended the request. The end travels with the tokens, since a message of its own could be
    lost, and the receipt with it, after the tokens had arrived."""

    rid: Name
    attempt: Count
    start: Count
    ids: list[Token]
    end: End | None = None


class Tokens(FromWorker, tag="tokens", frozen=True):
    """All tokens of one engine step. `step`: that step, the last one if the worker collects tokens of several."""

    items: list[TokenItem]
    step: EngineStep | None = None


class Failed(FromWorker, tag="failed", frozen=True):
    """A worker gives a request up. `retry`: another attempt may succeed. `avoid`: instances that the next attempt
    should not use, if there are others: its KV could not be moved between them. `lost`: the decode instance with which
    its KV was lost, "" if that is not why."""

    rid: Name
    attempt: Count
    why: str
    retry: bool
    avoid: list[Name] = []
    lost: Name = ""


class NotMigrated(FromWorker, tag="not_migrated", frozen=True):
    """A running request does not go on elsewhere as the Migrate with this `next` has asked. It goes on here; but if
    `held`, another instance may have all its KV, and it waits here for a Migrate that says where it goes on."""

    rid: Name
    attempt: Count
    next: Count
    why: str
    held: bool = False


class LoneStep(FromWorker, tag="lone_step", frozen=True):
    """The worker's next step computes this request alone (Assign.alone). The engine waits for the Proceed with the same
    `number`, which counts from 1 for the life of the process. `stage`: PREFILL, or WAITING for a decode step. `over`:
    the step has ended, and the engine waits all the same: when the worker dies later, this step was not the cause."""

    rid: Name
    attempt: Count
    number: Count
    stage: Stage
    over: bool = False


class FlipWanted(Record, tag="flip_wanted", frozen=True):
    """The monitor's transition watcher asks the broker to change an instance's role."""

    iid: Name
    role: str
    why: str


WorkerEvent = Ready | Heartbeat | Staged | Tokens | Failed | NotMigrated | LoneStep | FlipWanted

# ---- workers -> monitor (published)


class LoadReport(FromWorker, tag="load", frozen=True):
    """A worker's load, published every `load_ms` and at once after a role change."""

    role: str
    load: Load


# ---- monitor -> prefill workers, broker (published)


class InstanceLoad(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One instance's newest load report, `age_s` seconds old when the view was made."""

    iid: Name
    incarnation: int
    role: str
    age_s: float
    load: Load


class ClusterView(Record, tag="view", frozen=True):
    """The load of all instances that report, published every `load_ms` and at once after a role change. A higher
    `number` replaces a lower one of the same `epoch` (the monitor's incarnation). `flip`: name of the monitor's flip
    policy. `keeps`: the phase that an adaptive instance keeps to for now: prefill. The others decode, and prefill too
    where their decodes leave time."""

    epoch: int
    number: Count
    loads: list[InstanceLoad]
    flip: str = "none"
    keeps: dict[Name, str] = {}


# ---- to a worker's inbox


class Assign(Record, tag="assign", frozen=True):
    """Assigns a request to a prefill instance. `output`, from earlier attempts, is prefilled like the prompt and still
    counts as output. `alone`: it may have killed workers, so its prefill and its first decode steps are lone steps:
    nothing else is computed in them. `lost`: instances that were lost with it; they get it only if no other has memory
    now. `avoid`: as in the Failed of earlier attempts. `siblings`: choices with the same prompt and no output yet: one
    prefill and one transfer serve all. Every report names each choice on its own, by its id as `rid`. `pinned`: the
    only decode instance to offer it to, "" for the dispatcher's choice. Such a request is a canary: it comes after all
    others and is given up when that instance refuses it. `slo`: its limits, found when it arrived.
    `ttft_s`: what is left until the first token is late, or with `output` the next one; negative: it is late."""

    rid: Name
    attempt: Count
    prompt: list[int]
    output: list[int]
    sampling: Sampling
    deadline_s: float | None = None  # seconds left; None: no deadline
    alone: bool = False
    lost: list[Name] = []
    avoid: list[Name] = []
    siblings: list[Sibling] = []
    pinned: Name = ""
    slo: Slo = Slo()


class Proceed(Record, tag="proceed", frozen=True):
    """The answer to a LoneStep: the broker knows of it, so the engine may go on."""

    rid: Name
    attempt: Count
    number: Count


class Flip(Record, tag="flip", frozen=True):
    """Changes the role in which a worker takes new work; it finishes the requests that it has. The answer is a
    Heartbeat with this number: one with the role alone may have been sent before the Flip arrived."""

    role: str
    number: Count


class Migrate(Record, tag="migrate", frozen=True):
    """Tells a worker that decodes a request to hand it over to instance `to`, where it goes on as attempt `next` of it.
    With its own id as `to`: to go on with it here, whatever Migrate up to that `next` has asked for."""

    rid: Name
    attempt: Count
    to: Name
    next: Count


class Close(Record, tag="close", frozen=True):
    """Tells a worker to stop a request, in any stage, up to this attempt, and to drop it. `reason`: the end reason, as
    in Done; "" if the request continues on another worker or as another attempt. `outputs`: the output length, for
    length statistics, if the request ended by itself ("stop" or "length"); 0 for any other end and if `ignore_eos`
    fixed the length."""

    rid: Name
    attempt: Count
    outputs: Count = 0
    reason: str = ""


class Resend(Record, tag="resend", frozen=True):
    """Asks for the output tokens of a request again from index `start` on, with the end if there is one."""

    rid: Name
    attempt: Count
    start: Count


class Membership(Record, tag="membership", frozen=True):
    """The live instances. `number` counts their changes in an `epoch` (the broker's incarnation). Without `since`, the
    Membership is whole: it lists all of them. With it, it is a change of the Membership with that number: `instances`
    are new or different, those named in `gone` are no longer there. `serial` counts all Memberships of the epoch, those
    without a change too: `Heartbeat.read`.

    A whole one is also the answer to Ready. A worker sends Ready again when it is not listed, lacks the Membership
    that a change is of, or receives none for a while."""

    epoch: int
    number: Count
    serial: Count
    instances: list[Instance]
    since: Count | None = None
    gone: list[Name] = []


FromBroker = Assign | Proceed | Flip | Migrate | Close | Resend | Membership
InboxMessage = FromBroker | Offer | LengthUpdate | Grant | Defer | Refuse | Chunk | Landed | Drop
