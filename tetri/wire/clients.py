"""What clients and the broker say to each other."""

from __future__ import annotations

from tetri.request import Count, Name, PredictorStatus, Receipt, Record, Sampling, Turn, Usage

# ---- clients -> broker


class Submit(Record, tag="submit", frozen=True):
    """Exactly one of `prompt` (text or token ids) and `messages` (a conversation) is given. The same `key`, drawn by
    the client, is the same request, not a second one."""

    key: Name
    prompt: str | list[int] | None = None
    messages: list[Turn] | None = None
    sampling: Sampling = Sampling()
    deadline_s: float | None = None  # seconds from arrival; past it the request ends with reason "deadline"


class Cancel(Record, tag="cancel", frozen=True):
    rid: Name


class Attach(Record, tag="attach", frozen=True):
    """Send me all of this request from token `start` on. Also the way to ask whether the broker is there."""

    rid: Name
    start: Count = 0


class Inspect(Record, tag="inspect", frozen=True):
    """Ask for a Status."""


class ChangeRole(Record, tag="change_role", frozen=True):
    """Have an instance take new work as prefill, decode or mixed; the answer is RoleChanged or Refused."""

    key: Name
    iid: Name
    role: str


ClientMessage = Submit | Cancel | Attach | Inspect | ChangeRole

# ---- broker -> clients


class Accepted(Record, tag="accepted", frozen=True):
    key: Name
    rid: Name
    prompt_tokens: int


class Refused(Record, tag="refused", frozen=True):
    """`key` is the Submit's or the ChangeRole's key, or the rid of a Cancel or Attach that names no known request."""

    key: Name
    reason: str
    retry_after_s: float | None = None


class Delta(Record, tag="delta", frozen=True):
    """Output tokens from `start` on and the text that they complete, often none: what may be a stop text is held."""

    rid: Name
    start: Count
    ids: list[int]
    text: str


class Done(Record, tag="done", frozen=True):
    """The last message of a request. `reason`: stop, length, cancelled, deadline, or error (then `error` says
    why). `timeline`: seconds spent in each stage; they add up to `jct_s`."""

    rid: Name
    reason: str
    usage: Usage
    timeline: dict[str, float]
    ttft_s: float | None
    jct_s: float
    receipt: Receipt
    error: str | None = None


class InstanceStatus(Record, frozen=True):
    iid: Name
    role: str
    state: str  # ready, lost
    incarnation: int
    blocks: Count
    free_blocks: int
    queued: Count
    running: Count
    held: int
    note: str = ""
    paths: dict[str, Count] = {}  # KV path -> instances to or from which KV moves over it
    counters: dict[str, Count] = {}  # what happened to the KV that it took, since its process started
    slots_used: Count = 0  # of its KV store, those that are not free
    predictor: PredictorStatus | None = None  # of output lengths; None: it learns nothing of them


class MonitorStatus(Record, frozen=True):
    """The newest view that the broker has heard from the monitor, and how long ago."""

    number: Count
    age_s: float
    flip: str


class Status(Record, tag="status", frozen=True):
    instances: list[InstanceStatus]
    requests: dict[str, int]  # stage -> how many rows are open in it
    counters: dict[str, int]
    model: str
    monitor: MonitorStatus | None = None  # None: none was heard since the broker's start


class RoleChanged(Record, tag="role_changed", frozen=True):
    """The instance takes new work as `role`; it took `took_s` seconds from the request to the worker's answer."""

    key: Name
    iid: Name
    role: str
    was: str
    took_s: float


BrokerReply = Accepted | Refused | Delta | Done | Status | RoleChanged
