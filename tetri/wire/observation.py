"""What shows how requests and instances fare: what workers count and trace, and what the broker makes of it. None of it
changes how a request is served, and none has the text or the tokens of one.

Workers report with their heartbeats, so a report costs nothing per token, and what a lost heartbeat carried is lost.
"""

from __future__ import annotations

from msgspec import Struct

from tetri.request import Count, Name, Receipt, Record, Slo, Stage

# ---- workers -> broker, in Heartbeat and Tokens


class Transferred(Record, frozen=True):
    """KV that an instance has received over one path. `seconds`: how long these chunks took together, each from when it
    was announced and the engine had blocks for it until it was in them. `failed`: fetches that gave no valid chunk."""

    chunks: Count = 0
    bytes: Count = 0
    seconds: float = 0.0
    failed: Count = 0


class Activity(Record, frozen=True):
    """What an instance has done since its process started.

    steps, step_s            engine steps (forward passes), and the seconds that they took
    chunk_steps              those that computed a prefill chunk
    chunk_tokens             prompt tokens computed in these
    chunk_space              prompt tokens for which these had space: fill = chunk_tokens / chunk_space
    decode_steps             those with a decode batch
    decode_tokens            output tokens that these wrote: mean batch = decode_tokens / decode_steps
    recomputed               tokens of preempted decode requests that were computed again
    preempted                preemptions of decode requests
    received                 KV path -> what came over it
    events_left_out          trace events that did not fit into a heartbeat
    """

    steps: Count = 0
    step_s: float = 0.0
    chunk_steps: Count = 0
    chunk_tokens: Count = 0
    chunk_space: Count = 0
    decode_steps: Count = 0
    decode_tokens: Count = 0
    recomputed: Count = 0
    preempted: Count = 0
    received: dict[str, Transferred] = {}
    events_left_out: Count = 0


class EngineStep(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """One engine step, or several that ran in one go. `at`: its end, in seconds of the worker's own clock. `batch`:
    output tokens that one pass wrote for decode requests; `chunk_tokens`: prompt tokens computed beside them. `passes`:
    forward passes."""

    at: float
    seconds: float
    batch: Count
    chunk_tokens: Count = 0
    passes: Count = 1


class TraceEvent(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Something that happened to a choice on the instance `iid` ("broker": at the broker; "" in a Heartbeat: at its
    sender), apart from its decode steps. What happened to choices that share a prefill or a transfer is reported for
    one of them, the first that went on there. `at`: when it began; in a Heartbeat on the worker's own clock, in a
    Timeline since the request's arrival. `seconds`: how long it took, 0 for an instant. `peer`: the other instance, ""
    if there is none. `first`, `last`: tokens or KV blocks [first, last). `size`: see below. `note`: in a few words, ""
    if there is nothing to say.

    kind          what                                     first, last    size
    chunk         a prefill chunk was computed             tokens         tokens of the whole step
    recompute     KV was computed again at the decoder     tokens         tokens of the whole step
    offered       KV was offered to `peer`
    granted       `peer` has reserved memory
    deferred      `peer` has no memory now
    refused       `peer` refused: `note` says why
    export        a KV chunk was copied into the slab      blocks         its index
    fetch         a KV chunk was fetched from `peer`; note: blocks        bytes that came
                  the path, and what was wrong with it
    preempted     lost its memory to others
    retry         another attempt begins: `note` says why
    migrated      this attempt is decoded here, an earlier one was at `peer`
    """

    kind: str
    rid: Name
    attempt: Count
    at: float
    iid: Name = ""
    seconds: float = 0.0
    peer: Name = ""
    first: Count = 0
    last: Count = 0
    size: Count = 0
    note: str = ""


# ---- broker -> clients and operators


class Histogram(Record, frozen=True):
    """How often a value was at most `bounds[i]` and above the bound before: `counts[i]`; the last of `counts` is for
    values above all bounds. `total`: the sum of the values."""

    bounds: list[float]
    counts: list[Count]
    total: float


class Measures(Record, frozen=True):
    """What the broker has measured since its start. `counts`: name -> label -> number; docs/metrics.md lists both."""

    counts: dict[str, dict[str, Count]]
    histograms: dict[str, Histogram]


class Move(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A choice entered a stage `age_s` seconds ago. `iid`: the instance that holds it since then, "" if none does.
    `outputs`: its output tokens so far."""

    rid: Name
    stage: Stage
    iid: Name
    age_s: float
    attempt: Count
    outputs: Count


class Ended(Record, frozen=True):
    """A choice that ended `age_s` seconds ago; the fields are those of its Done. `tpot_s`: seconds per output token
    after the first, None if there were fewer than two."""

    rid: Name
    reason: str
    age_s: float
    ttft_s: float | None
    tpot_s: float | None
    jct_s: float
    prompt_tokens: Count
    outputs: Count
    attempts: Count
    prefill: Name = ""
    decode: Name = ""
    slo: Slo = Slo()
    slo_result: str = ""


class ClusterEvent(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Something that happened to instance `iid` ("" for the whole deployment) `age_s` seconds ago. `note`: in one line.

    joined   it registered                    lost     it was lost
    back     it is back, as the same process  role     it has another role
    failing  its KV cannot be read            healed   it can be read again
    killed   a request was ended, since it had killed its workers
    """

    kind: str
    iid: Name
    age_s: float
    note: str


class StageSpan(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A stage of one attempt, from `start_s` on (since the request's arrival), held by `iid` ("": no instance)."""

    stage: Stage
    attempt: Count
    iid: Name
    start_s: float
    seconds: float


class StepSpan(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """An engine step that wrote `tokens` output tokens of the choice, from `start_s` on (since the request's arrival).
    `batch`, `chunk_tokens`, `passes`: as in EngineStep."""

    start_s: float
    seconds: float
    iid: Name
    tokens: Count
    batch: Count
    chunk_tokens: Count
    passes: Count


class Timeline(Record, tag="timeline", frozen=True):
    """All that is known of how a choice was served. Times are in seconds since the request's arrival, which was
    `age_s` seconds ago. `reason`: None while it is open. `tpot_s`: as in Ended, or so far. `slo`, `slo_result`: as in
    Done; "" while it is open. `left_out`: events and steps that were not kept, and tokens that were sent again, whose
    steps are not known."""

    rid: Name
    choice: Count
    choices: Count
    age_s: float
    prompt_tokens: Count
    outputs: Count
    attempts: Count
    stage: Stage
    reason: str | None = None
    error: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    jct_s: float | None = None
    receipt: Receipt | None = None
    stages: list[StageSpan] = []
    events: list[TraceEvent] = []
    steps: list[StepSpan] = []
    left_out: Count = 0
    slo: Slo = Slo()
    slo_result: str = ""
