"""The protocol: one union of tagged records per receiver. Clients' messages stand in clients.py, those between
workers in handover.py; no other message exists.

attempt      counted up by the broker each time a request starts over
incarnation  random, drawn once per process start; tells a restarted worker from its predecessor
offer        one try of one attempt at one decode worker, numbered by the prefill worker
"""

from __future__ import annotations

from msgspec import Struct

from tetri.instance import Instance
from tetri.request import Count, Name, PredictorStatus, Receipt, Record, Sampling, Stage
from tetri.wire.handover import Chunk, Drop, Grant, Landed, LengthUpdate, Offer, Refuse

# ---- workers -> broker


class FromWorker(Record, frozen=True):
    iid: Name
    incarnation: int


class Load(Record, frozen=True):
    """One instance's load at one moment. Blocks are KV blocks, *predicted* is by the upper or lower end of the length
    ranges, as configured, and by the cost table.

    queued_tokens   prompt tokens not yet computed, `queued_s` the predicted seconds for them
    waiting         requests granted and not yet in the batch; `running`: in the batch
    landed          of those that wait, the ones whose KV is all here: they wait for a place, not for their KV
    heavy           of those two, predicted to write more than `heavy_tokens` output tokens
    growth_blocks   blocks that those two are predicted to take in addition until they end
    decode_s        predicted seconds until they have all ended
    busy            share of the time since the last report in which the engine computed
    stalled         whether the prompts wait for a decode instance that takes them, and not for this one
    """

    free_blocks: int
    queued: Count = 0
    queued_tokens: Count = 0
    queued_s: float = 0.0
    waiting: Count = 0
    landed: Count = 0
    running: Count = 0
    heavy: Count = 0
    growth_blocks: Count = 0
    decode_s: float = 0.0
    busy: float = 0.0
    stalled: bool = False


class Hold(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a worker holds of one request: `outputs` is how many output tokens it knows, all attempts together."""

    rid: Name
    attempt: Count
    stage: Stage
    outputs: Count


class Ready(Record, tag="ready", frozen=True):
    instance: Instance
    load: Load


class Heartbeat(FromWorker, tag="heartbeat", frozen=True):
    """`flip`: the number of the last Flip that was obeyed, 0 before the first. `counters`: since the process started,
    what happened to the KV that it took, by name. `slots_used`: of its KV store, those that are not free.
    `predictor`: None unless it predicts output lengths from what it has learnt."""

    role: str
    load: Load
    holds: list[Hold]
    flip: Count = 0
    counters: dict[str, Count] = {}
    slots_used: Count = 0
    predictor: PredictorStatus | None = None


class Staged(FromWorker, tag="staged", frozen=True):
    """A request entered PREFILL, MOVING, WAITING or DECODE on this worker. `peer`: the other half's instance."""

    rid: Name
    attempt: Count
    stage: Stage
    peer: str = ""


class End(Record, frozen=True):
    """A worker's end of a request; `reason` is stop or length."""

    reason: str
    receipt: Receipt


class TokenItem(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Output tokens of one request from index `start` on; index 0 is the first token after the prompt. `end`: the last
    of them ended the request, None while it goes on. It travels with these tokens: a message of its own could be lost
    with its worker when the tokens were not, and the receipt with it."""

    rid: Name
    attempt: Count
    start: Count
    ids: list[int]
    end: End | None = None


class Tokens(FromWorker, tag="tokens", frozen=True):
    """All tokens of one engine step."""

    items: list[TokenItem]


class Failed(FromWorker, tag="failed", frozen=True):
    """A worker cannot go on with a request. `retry`: another attempt may succeed."""

    rid: Name
    attempt: Count
    why: str
    retry: bool


class FlipWanted(Record, tag="flip_wanted", frozen=True):
    """The monitor's transition watcher wants an instance to change its role; the broker carries it out."""

    iid: Name
    role: str
    why: str


WorkerEvent = Ready | Heartbeat | Staged | Tokens | Failed | FlipWanted

# ---- workers -> monitor (published)


class LoadReport(FromWorker, tag="load", frozen=True):
    """Every `load_ms`, and at once when the role has changed."""

    role: str
    load: Load


# ---- monitor -> prefill workers, broker (published)


class InstanceLoad(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One instance's newest report; `age_s` seconds old when the view was made."""

    iid: Name
    incarnation: int
    role: str
    age_s: float
    load: Load


class ClusterView(Record, tag="view", frozen=True):
    """The load of all instances that report; a higher `number` replaces a lower one of the same `epoch` (a monitor's
    incarnation). Sent every `load_ms` and at once when a role has changed. `flip`: the policy by which the monitor
    lets instances change their role."""

    epoch: int
    number: Count
    loads: list[InstanceLoad]
    flip: str = "none"


# ---- -> a worker's inbox


class Assign(Record, tag="assign", frozen=True):
    """Prefill this. `output`, from earlier attempts, is prefilled like the prompt and keeps counting as output."""

    rid: Name
    attempt: Count
    prompt: list[int]
    output: list[int]
    sampling: Sampling
    deadline_s: float | None = None  # seconds left


class Flip(Record, tag="flip", frozen=True):
    """Take new work as this role from now on; what is here is finished. The answer is a Heartbeat with this number: one that
    only says the role may have been on its way before."""

    role: str
    number: Count


class Close(Record, tag="close", frozen=True):
    """Nobody wants this request, up to this attempt, any more: stop it in any stage and forget it. `reason`: why the
    request is over, as in Done; empty when it goes on elsewhere, or as another attempt. `outputs`: how many tokens it
    wrote when it ended by itself, by "stop" or "length"; 0 for any other end, and for a length that its sampling fixed
    (`ignore_eos`): from these nothing can be learnt."""

    rid: Name
    attempt: Count
    outputs: Count = 0
    reason: str = ""


class Resend(Record, tag="resend", frozen=True):
    """Send the tokens of this request again from output index `start` on, with its end if it has ended."""

    rid: Name
    attempt: Count
    start: Count


class Membership(Record, tag="membership", frozen=True):
    """All live instances; a higher `number` replaces a lower one of the same `epoch` (a broker's incarnation). Also
    the answer to Ready: a worker that does not find itself in it, or hears none for a while, says Ready again."""

    epoch: int
    number: Count
    instances: list[Instance]


InboxMessage = (
    Assign | Flip | Close | Resend | Membership | Offer | LengthUpdate | Grant | Refuse | Chunk | Landed | Drop
)
