"""The messages between clients and the broker, and between operators and the broker."""

from __future__ import annotations

from tetri.request import (
    DEFAULT_TOKENS,
    AskedSampling,
    Count,
    Name,
    Positive,
    PredictorStatus,
    Receipt,
    Record,
    Slo,
    StepRatio,
    Token,
    Turn,
    Usage,
)
from tetri.wire.load import Load
from tetri.wire.observation import Activity, ClusterEvent, Ended, Measures, Move, Timeline

# ---- clients -> broker


class Submit(Record, tag="submit", frozen=True):
    """Submits a request with exactly one of `prompt` (text or token ids) and `messages` (a conversation). The client
    draws `key` at random: a Submit with a known key is a repetition, not a second request. It draws `secret` at random
    too, and shows it again to get at the request later. `n`: number of choices, each an output of its own; one prefill
    serves them all. `default_tokens`: the limit of the output if `sampling.max_tokens` is None, where so many fit.
    `slo`: its limits of latency; where it names none, those of the deployment hold."""

    key: Name
    secret: Name
    prompt: str | list[int] | None = None
    messages: list[Turn] | None = None
    sampling: AskedSampling = AskedSampling()
    deadline_s: float | None = None  # seconds from arrival; past it the request ends with reason "deadline"
    n: Positive = 1
    default_tokens: Positive = DEFAULT_TOKENS
    slo: Slo = Slo()


class Cancel(Record, tag="cancel", frozen=True):
    """Ends a request with reason "cancelled"; the answer is its Done. `rid`: its id, or the key of its Submit.
    `secret`: that of its Submit."""

    rid: Name
    secret: Name


class Attach(Record, tag="attach", frozen=True):
    """Asks for everything of a choice from token `start` on; further output of the request goes to this client. Also
    serves to ask whether the broker is running. `secret`: that of its Submit."""

    rid: Name
    secret: Name
    start: Count = 0
    choice: Count = 0


class Inspect(Record, tag="inspect", frozen=True):
    """Asks for a Status. Operators send it too."""


class CheckReadiness(Record, tag="check_readiness", frozen=True):
    """Asks for a Readiness. Operators send it too. While somebody asks, the broker tries the pairs without traffic."""


class Observe(Record, tag="observe", frozen=True):
    """Asks for an Observation. Operators send it too. `epoch` and `since`: `epoch` and `serial` of the last one; its
    moves, ends and events are not repeated."""

    epoch: int = 0
    since: Count = 0


class Explain(Record, tag="explain", frozen=True):
    """Asks for the Timeline of a choice, open or ended. Operators send it too. `rid`: id of the request, or
    of the choice. The answer is Refused if nothing is known of it (any more), with the id of the choice as its key."""

    rid: Name
    choice: Count = 0


ClientMessage = Submit | Cancel | Attach | Inspect | CheckReadiness | Observe | Explain

# ---- operators -> broker


class ChangeRole(Record, tag="change_role", frozen=True):
    """Changes the role in which an instance takes new work: prefill, decode, mixed or auto. The answer is
    RoleChanged or Refused."""

    key: Name
    iid: Name
    role: str


class EndRequest(Record, tag="end_request", frozen=True):
    """As Cancel, for a request of any client: needs no secret."""

    rid: Name


OperatorMessage = Inspect | CheckReadiness | Observe | Explain | ChangeRole | EndRequest

# ---- broker -> clients and operators


class Accepted(Record, tag="accepted", frozen=True):
    """The broker has accepted the Submit of `key` as request `rid`. `max_tokens`: its limit, which the broker chose if
    the Submit has none."""

    key: Name
    rid: Name
    prompt_tokens: int
    max_tokens: int


class Refused(Record, tag="refused", frozen=True):
    """`key`: that of the refused Submit or ChangeRole, or the unknown rid of a Cancel, Attach or EndRequest.
    `retry_after_s`: seconds after which a retry may succeed; None: a retry is of no use."""

    key: Name
    reason: str
    retry_after_s: float | None = None


class Delta(Record, tag="delta", frozen=True):
    """Output tokens of a choice from index `start` on, and the text that they complete. `text` is often empty: text
    that may begin a stop text is held back."""

    rid: Name
    start: Count
    ids: list[Token]
    text: str
    choice: Count = 0


class Done(Record, tag="done", frozen=True):
    """The last message of a choice; a request has ended when all its choices have. `reason`: stop, length, cancelled,
    deadline or error; `error` explains the last. `timeline`: seconds spent in each stage, which add up to `jct_s`.
    `ttft_s`: None if there was no token. `slo`: its limits of latency. `slo_result`: met; ttft, tpot or both: the
    limits that it missed; failed: it ended by an error or its deadline; "": cancelled before it had missed any."""

    rid: Name
    reason: str
    usage: Usage
    timeline: dict[str, float]
    ttft_s: float | None
    jct_s: float
    receipt: Receipt
    error: str | None = None
    choice: Count = 0
    slo: Slo = Slo()
    slo_result: str = ""


class InstanceStatus(Record, frozen=True):
    """One instance in a Status, as of its last heartbeat. `held`: requests that it holds in any stage. `note`: why it
    is lost, which instance it cannot exchange KV with, or that it injects faults. `keeps`: the phase that an adaptive
    instance keeps to for now."""

    iid: Name
    role: str
    state: str  # ready, lost
    incarnation: int
    blocks: Count
    load: Load
    held: int
    note: str = ""
    paths: dict[str, Count] = {}  # KV path -> number of instances that it exchanges KV with over this path
    counters: dict[str, Count] = {}  # events of its KV receives since its process started
    slots_used: Count = 0  # slots of its KV store that are not free
    predictor: PredictorStatus | None = None  # None: it does not learn output lengths
    unread_by: dict[str, str] = {}  # decode instances that cannot read its KV -> why
    step_ratio: StepRatio = StepRatio()  # measured over predicted time of its engine steps
    activity: Activity = Activity()
    keeps: str = ""  # "": no phase


class MonitorStatus(Record, frozen=True):
    """The newest cluster view that the broker has received from the monitor, `age_s` seconds ago."""

    number: Count
    age_s: float
    flip: str


class Status(Record, tag="status", frozen=True):
    """The state of the cluster. `counters`: the broker's own, by name, since its start. `slo`: the limits of latency of
    a request that names none. `slo_requests`: how many choices kept theirs, by `slo_result`, since its start."""

    instances: list[InstanceStatus]
    requests: dict[str, int]  # stage -> number of open requests in it
    counters: dict[str, int]
    model: str
    monitor: MonitorStatus | None = None  # None: no cluster view has arrived since the broker's start
    notes: list[str] = []  # one line for people on each thing that works worse than it should
    slo: Slo = Slo()
    slo_requests: dict[str, Count] = {}


class Observation(Record, tag="observation", frozen=True):
    """What an onlooker shows: the state of the cluster and what has happened since the Observation before, oldest
    first. `epoch`: of this start of the broker. `serial`: for the next Observe. `missed`: moves, ends and events since
    then that are not kept any more."""

    epoch: int
    serial: Count
    status: Status
    measures: Measures
    moves: list[Move] = []
    ended: list[Ended] = []
    events: list[ClusterEvent] = []
    missed: Count = 0


class PairReadiness(Record, frozen=True):
    """Whether KV moves between a prefill and a decode instance.

    carried  a hand-over of a request has landed within `Readiness.within_s`
    busy     none has, and the last ones wait for these instances, which have other work
    unknown  none has, or none yet
    broken   the last one failed

    `why`: in one line, for all but `carried`."""

    prefill: Name
    decode: Name
    state: str
    age_s: float | None  # seconds since the last hand-over landed; None: none has
    why: str = ""


class Readiness(Record, tag="readiness", frozen=True):
    """Whether each pair in service, a prefill and a decode instance that can exchange KV, is `carried` or `busy`. `why`
    names what is not, in one line. `pairs`: those that are not `carried` first, at most 64 of `in_service`."""

    ready: bool
    why: str
    within_s: float
    in_service: Count
    pairs: list[PairReadiness]


class RoleChanged(Record, tag="role_changed", frozen=True):
    """The instance takes new work as `role` now, before as `was`. `took_s`: seconds from the ChangeRole to the worker's
    confirmation."""

    key: Name
    iid: Name
    role: str
    was: str
    took_s: float


BrokerReply = Accepted | Refused | Delta | Done | Status | Readiness | Observation | Timeline | RoleChanged
