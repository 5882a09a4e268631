"""The protocol: one union of tagged records per receiver. No other message exists.

attempt      counted up by the broker each time a request starts over
incarnation  random, drawn once per process start; tells a restarted worker from its predecessor
offer        one try of one attempt at one decode worker, numbered by the prefill worker
"""

from __future__ import annotations

from msgspec import Struct

from tetri.request import Capacity, Fingerprint, Receipt, Record, Sampling, Stage, Turn, Usage

# ---------------------------------------------------------------- clients -> broker


class Submit(Record, tag="submit", frozen=True):
    """Ask for a completion. Exactly one of `prompt` (text or token ids) and `messages` (a conversation) is
    given. `key` is drawn by the client; the same key again is the same request, not a second one.
    """

    key: str
    prompt: str | list[int] | None = None
    messages: list[Turn] | None = None
    sampling: Sampling = Sampling()
    deadline_s: float | None = None  # seconds from arrival; past it the request ends with reason "deadline"


class Cancel(Record, tag="cancel", frozen=True):
    rid: str


class Attach(Record, tag="attach", frozen=True):
    """Send me what this request has produced from token `start` on, and all that follows. Also the client's
    way to ask whether the broker is still there."""

    rid: str
    start: int = 0


class Inspect(Record, tag="inspect", frozen=True):
    """Ask for a Status."""


ClientMessage = Submit | Cancel | Attach | Inspect

# ---------------------------------------------------------------- broker -> clients


class Accepted(Record, tag="accepted", frozen=True):
    key: str
    rid: str
    prompt_tokens: int


class Refused(Record, tag="refused", frozen=True):
    """`key` is the Submit's key, or the rid of a Cancel or Attach that names no known request."""

    key: str
    reason: str
    retry_after_s: float | None = None


class Delta(Record, tag="delta", frozen=True):
    """Output tokens `start` .. `start + len(ids)` and the text that they complete (often empty: a character
    may need several tokens, a possible stop text is held back)."""

    rid: str
    start: int
    ids: list[int]
    text: str


class Done(Record, tag="done", frozen=True):
    """The last message of a request. `reason`: stop, length, cancelled, deadline, or error (then `error` says
    why). `timeline`: seconds spent in each stage; they add up to `jct_s`."""

    rid: str
    reason: str
    usage: Usage
    timeline: dict[str, float]
    ttft_s: float | None
    jct_s: float
    receipt: Receipt
    error: str | None = None


class InstanceStatus(Record, frozen=True):
    iid: str
    role: str
    state: str  # ready, lost
    incarnation: int
    blocks: int
    free_blocks: int
    queued: int
    running: int
    held: int
    note: str = ""


class Status(Record, tag="status", frozen=True):
    instances: list[InstanceStatus]
    requests: dict[str, int]  # stage -> how many rows are open in it
    counters: dict[str, int]
    model: str


BrokerReply = Accepted | Refused | Delta | Done | Status

# ---------------------------------------------------------------- workers -> broker


class FromWorker(Record, frozen=True):
    iid: str
    incarnation: int


class Load(Record, frozen=True):
    """One instance's load at one moment. Blocks are KV blocks; `queued_tokens` prompt tokens not yet computed."""

    free_blocks: int
    queued: int = 0
    queued_tokens: int = 0
    waiting: int = 0
    running: int = 0


class Hold(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a worker holds of one request: `outputs` is how many output tokens it knows, all attempts together."""

    rid: str
    attempt: int
    stage: Stage
    outputs: int


class Ready(FromWorker, tag="ready", frozen=True):
    role: str
    inbox: str
    fingerprint: Fingerprint
    capacity: Capacity
    load: Load


class Beat(FromWorker, tag="beat", frozen=True):
    role: str
    load: Load
    holds: list[Hold]


class Staged(FromWorker, tag="staged", frozen=True):
    """A request entered PREFILL, MOVING, WAITING or DECODE on this worker. With MOVING, `peer` is the decode
    instance that granted the offer (empty while none did)."""

    rid: str
    attempt: int
    stage: Stage
    peer: str = ""


class TokenItem(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Output tokens of one request from index `start` on; index 0 is the first token after the prompt."""

    rid: str
    attempt: int
    start: int
    ids: list[int]


class Tokens(FromWorker, tag="tokens", frozen=True):
    """All tokens of one engine step."""

    items: list[TokenItem]


class Finished(FromWorker, tag="finished", frozen=True):
    """A worker ended a request after `outputs` output tokens in all; `reason` is stop or length. `receipt`
    holds what this worker knows; the broker fills in the rest."""

    rid: str
    attempt: int
    reason: str
    outputs: int
    receipt: Receipt


class Failed(FromWorker, tag="failed", frozen=True):
    """A worker cannot go on with a request. `retry`: another attempt may succeed."""

    rid: str
    attempt: int
    why: str
    retry: bool


WorkerEvent = Ready | Beat | Staged | Tokens | Finished | Failed

# ---------------------------------------------------------------- -> a worker's inbox


class Assign(Record, tag="assign", frozen=True):
    """Prefill this. `output` are the tokens that earlier attempts produced: they are prefilled like the prompt
    and keep counting as output."""

    rid: str
    attempt: int
    prompt: list[int]
    output: list[int]
    sampling: Sampling


class Close(Record, tag="close", frozen=True):
    """Nobody wants this request any more, up to this attempt: stop it in any stage and forget it."""

    rid: str
    attempt: int


class Resend(Record, tag="resend", frozen=True):
    """Send the tokens of this request again from output index `start` on, and its end if it has ended."""

    rid: str
    attempt: int
    start: int


class InstanceView(Record, frozen=True):
    """One instance as others see it."""

    iid: str
    incarnation: int
    role: str
    inbox: str
    fingerprint: Fingerprint
    capacity: Capacity
    load: Load


class ClusterView(Record, tag="view", frozen=True):
    """All live instances; a higher `number` replaces a lower one of the same `epoch` (a broker's incarnation).
    Sent at every change and at least every `view_s`; it is also the answer to Ready. A worker that does not
    find its own incarnation in it, or hears no view for a while, says Ready again."""

    epoch: int
    number: int
    instances: list[InstanceView]


class BetweenWorkers(Record, frozen=True):
    """`src` is the sender's instance id, `incarnation` the sender's."""

    src: str
    incarnation: int
    rid: str
    attempt: int
    offer: int


class Handle(Record, frozen=True):
    """Where a chunk's blocks lie: block i in slot `slots[i]` of `segment`, written in generation
    `generations[i]`. The slot's generation is read again after the copy: a reused slot shows."""

    segment: str
    slots: list[int]
    generations: list[int]
    block_bytes: int


class Offer(BetweenWorkers, tag="offer", frozen=True):
    """Will you decode this? Reserve `blocks` KV blocks for `prompt` + `output` and answer Grant or Refuse to
    `inbox`. Sent again with the same number when unanswered; the answer is then the same."""

    inbox: str
    fingerprint: Fingerprint
    prompt: list[int]
    output: list[int]
    sampling: Sampling
    blocks: int


class Grant(BetweenWorkers, tag="grant", frozen=True):
    pass


class Refuse(BetweenWorkers, tag="refuse", frozen=True):
    """Also the answer to anything that names an offer which the receiver does not know."""

    why: str


class Chunk(BetweenWorkers, tag="chunk", frozen=True):
    """Blocks [start, stop) of the request are ready to be taken at `handle`. `digest` is xxh3-64 over them in
    order. The last chunk carries the first token (index len(output) of the Offer)."""

    index: int
    start: int
    stop: int
    handle: Handle
    digest: int
    token: int | None = None


class Landed(BetweenWorkers, tag="landed", frozen=True):
    """This chunk is in my own memory and its digest is right: the sender may free it."""

    index: int


class Drop(BetweenWorkers, tag="drop", frozen=True):
    """The sender takes the offer back: give the reservation up."""

    why: str


InboxMessage = Assign | Close | Resend | ClusterView | Offer | Grant | Refuse | Chunk | Landed | Drop
