"""Types that describe a request and an instance: sampling, stages, receipt, fingerprint, length predictions. The wire
messages, every core and the client use them.

The request table, timeline, metrics, logs and simulator use the same stages:
QUEUED -> PREFILL -> MOVING -> WAITING -> DECODE -> DONE | FAILED | CANCELLED.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, Self

from msgspec import Meta, Struct
from msgspec.structs import asdict, replace

_ANSWER = re.compile("^(?:chat)?cmpl-")  # begins the id of an answer over HTTP
Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(max_length=128)]  # a request id, an instance id or a client's key
Address = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]

# The new work that an instance takes. mixed: both kinds; auto: both, as far apart as the traffic asks.
ROLES = ("prefill", "decode", "mixed", "auto")
PREFILL_ROLES = ("prefill", "mixed", "auto")
DECODE_ROLES = ("decode", "mixed", "auto")


class Record(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every value that is sent between processes: immutable, and decoded strictly."""

    def changed(self, **fields: Any) -> Self:
        """Return a copy with other values in these fields."""
        return replace(self, **fields)


class Value(Struct, frozen=True):
    """Base of small values that cores create by the million: eight times as fast to create as a frozen dataclass."""

    def fields(self) -> dict[str, Any]:
        """Return the values by field."""
        return asdict(self)


class Stage(StrEnum):
    """The stage of a request. The last three are ends."""

    QUEUED = "queued"  # accepted, no worker computes it yet
    PREFILL = "prefill"  # its first chunk was scheduled
    MOVING = "moving"  # the first token is known, KV blocks are still being moved
    WAITING = "waiting"  # the decode instance holds all KV and the first token
    DECODE = "decode"  # in the running batch
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the request is over."""
        return self in _ENDED


_ENDED = frozenset((Stage.DONE, Stage.FAILED, Stage.CANCELLED))


DEFAULT_TOKENS = 128  # output tokens of a request that names no limit, where so many fit


MAX_CHOICES = 16  # of one request
MAX_DEADLINE_S, MAX_LIMIT_S = 1e6, 86400.0  # the longest deadline, and the longest limit of latency
MAX_LOGPROBS = 20  # most likely tokens at each place of the output


class TokenLogprob(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An output token with its log probability, by the model's own logits: before penalties, bias and temperature.
    `top`: the most likely tokens at its place, the most likely first."""

    id: TokenId
    logprob: float
    top: dict[TokenId, float] = {}


Token = TokenId | TokenLogprob  # an output token: a TokenLogprob where log probabilities were asked for


def token_ids(tokens: Iterable[Token]) -> list[int]:
    """The ids of output tokens."""
    return [token if isinstance(token, int) else token.id for token in tokens]


def choice_id(rid: str, index: int) -> str:
    """The id by which workers know a choice of request `rid`: for the first one, that of the request."""
    return f"{rid}.{index}" if index else rid


def rid_of(name: str) -> str:
    """The id of a request, from that or from the id of its answer over HTTP: cmpl-RID or chatcmpl-RID."""
    return _ANSWER.sub("", name, count=1)


class AskedSampling(Record, frozen=True):
    """How output tokens are sampled, as a client asks for it. `max_tokens` None: the default of the request
    (Submit.default_tokens), or fewer if fewer fit into the model's context and the largest decode instance after the
    prompt. `temperature` 0 is greedy; `seed` makes a sampled output repeatable. `logprobs`: None, or how many of the
    most likely tokens each output token comes with. `logit_bias`: added to the logits of these tokens. `stop_token_ids`
    end the output as an end of sequence does."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: list[str] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: dict[TokenId, float] = {}
    stop_token_ids: list[TokenId] = []

    def limited(self, max_tokens: int) -> Sampling:
        """Return the Sampling with this limit, if none was asked for."""
        return Sampling(**{**asdict(self), "max_tokens": max_tokens if self.max_tokens is None else self.max_tokens})


class Sampling(AskedSampling, frozen=True):
    """How output tokens are sampled, with a limit."""

    max_tokens: int = DEFAULT_TOKENS

    def for_choice(self, index: int) -> Sampling:
        """Return the Sampling of a choice. Its seed is that of the request plus the index, as in vLLM, so a single
        request with that seed repeats it."""
        return self if self.seed is None else self.changed(seed=(self.seed + index) % (1 << 63))


# field, least, most; both are allowed
RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_k", 0, 1 << 30),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-3, 100.0),
    ("max_tokens", 1, 1 << 30),
    ("min_tokens", 0, 1 << 30),
)
_LARGE = 10**300
MAX_BIAS = 100
MAX_IDS = 1024  # of logit_bias, and of stop_token_ids
MAX_STOPS = 16
MAX_STOP_CHARS = 256


def sampling_problem(s: AskedSampling, default_tokens: int = DEFAULT_TOKENS) -> str | None:
    """The first invalid value of a Sampling, in one line that states what is allowed; None if all are valid.
    `default_tokens`: the limit of one that names none."""
    most = default_tokens if s.max_tokens is None else s.max_tokens
    for name, low, high in RANGES:
        value = getattr(s, name)
        if value is None:
            continue
        if not low <= value <= high:  # also catches NaN
            bound = f"at least {low:g}" if value < low else f"from {low:g} to {high:g}"
            return f"{name} must be {bound}, got {_described(value)}"
    if not 0.0 < s.top_p <= 1.0:
        return f"top_p must be above 0 and at most 1, got {_described(s.top_p)}"
    if s.seed is not None and not 0 <= s.seed < 1 << 63:
        return f"seed must be from 0 to 2^63 - 1, got {s.seed if abs(s.seed) < _LARGE else _described(s.seed)}"
    if s.min_tokens > most:
        default = ", the default" if s.max_tokens is None else ""
        return f"min_tokens ({s.min_tokens}) must not exceed max_tokens ({most}{default})"
    if len(s.stop) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in s.stop):
        return f"stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters"
    if s.logprobs is not None and not 0 <= s.logprobs <= MAX_LOGPROBS:
        return f"logprobs must be from 0 to {MAX_LOGPROBS}, got {_described(s.logprobs)}"
    if not all(-MAX_BIAS <= bias <= MAX_BIAS for bias in s.logit_bias.values()):  # also catches NaN
        return f"a logit_bias must be from -{MAX_BIAS} to {MAX_BIAS}"
    for name, ids in (("logit_bias", s.logit_bias), ("stop_token_ids", s.stop_token_ids)):
        if len(ids) > MAX_IDS:
            return f"{name} takes at most {MAX_IDS} token ids"
    return None


def choices_problem(n: int, s: AskedSampling) -> str | None:
    """Why a request cannot have `n` choices, in one line; None if it can."""
    if n > MAX_CHOICES:
        return f"n must be at most {MAX_CHOICES}, got {_described(n)}"
    if n > 1 and s.temperature == 0:
        return f"n must be 1 when temperature is 0, got {n}: all choices would be the same"
    return None


def _described(value: float) -> str:
    if isinstance(value, int) and abs(value) >= _LARGE:
        return "a number of many digits"  # Python raises an error when it formats such a number
    return f"{value:g}"


class Slo(Record, frozen=True):
    """The limits of latency that a request should keep, in seconds; None: no limit of its own. `ttft_s`: from its
    arrival to its first token; `tpot_s`: on average between two tokens after that."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def result(self, ttft_s: float, tpot_s: float | None) -> str:
        """Which limits these times exceed: ttft, tpot or both; met if none. `tpot_s`: None: there was one token."""
        late = self.ttft_s is not None and ttft_s > self.ttft_s
        slow = self.tpot_s is not None and tpot_s is not None and tpot_s > self.tpot_s
        return "both" if late and slow else "ttft" if late else "tpot" if slow else "met"


SLO_RESULTS = ("met", "ttft", "tpot", "both", "failed")  # how requests keep their limits: the labels of `slo_requests`


def slo_problem(slo: Slo) -> str | None:
    """The first invalid limit, in one line that states what is allowed; None if both are valid."""
    for name in ("ttft_s", "tpot_s"):
        value = getattr(slo, name)
        if value is not None and not 0 < value <= MAX_LIMIT_S:  # also catches NaN
            return f"{name} must be above 0 and at most {MAX_LIMIT_S:g} seconds, got {value:g}"
    return None


class Turn(Record, frozen=True):
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Receipt(Record, frozen=True):
    """What happened to a request's KV: prompt_tokens = local + adopted + recomputed.

    local       prompt tokens that were prefilled by the engine that decoded them: their KV did not move
    adopted     prompt tokens whose KV the decode engine received as bytes
    recomputed  prompt tokens that the decode engine computed again, after a preemption
    kv_bytes    bytes of KV that moved, in `chunks` KV chunks, over the path `transport` ("none": no KV moved). Of
                choices that share a transfer, the first has these counts and the others zeros
    preempted   number of preemptions
    refetched   number of fetches that were repeated because a KV chunk arrived corrupt
    continued   output tokens of earlier attempts: the last attempt computed their KV anew and continued from there
    migrated    how often it has gone on at another decode instance while it ran; the KV that moved for that counts too

    Only the worker that ends a request knows these, except `continued`. They are None if no worker ended it: the
    request was cancelled, failed, passed its deadline, or the broker found a stop text first.
    """

    prompt_tokens: int
    adopted: int | None = None
    recomputed: int | None = None
    kv_bytes: int | None = None
    chunks: int | None = None
    transport: str | None = None
    prefill_instance: str | None = None
    decode_instance: str | None = None
    preempted: int | None = None
    attempts: int = 1
    refetched: int | None = None
    continued: Count = 0
    local: int | None = None
    migrated: Count = 0

    def after(self, before: Self) -> Self:
        """The receipt of a decode that has gone on at another instance, from those of both. All KV has moved there."""
        recomputed = min((before.recomputed or 0) + (self.recomputed or 0), self.prompt_tokens)
        sums = {name: (getattr(before, name) or 0) + (getattr(self, name) or 0) for name in _SUMS}
        return self.changed(
            **sums,
            local=0,
            adopted=self.prompt_tokens - recomputed,
            recomputed=recomputed,
            prefill_instance=before.prefill_instance,
            migrated=before.migrated + 1,
        )

    @property
    def kept(self) -> int:
        """Prompt tokens whose KV was computed once."""
        return (self.local or 0) + (self.adopted or 0)


_SUMS = ("kv_bytes", "chunks", "preempted", "refetched")


class Usage(Record, frozen=True):
    """Tokens of the prompt and of the output."""

    prompt_tokens: int
    completion_tokens: int


class LengthRange(Record, frozen=True):
    """Length range: the predicted output tokens of a request over all attempts, at least `low` and less than `high`.
    Raises ValueError if it is empty."""

    low: Count
    high: Positive

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"no length is at least {self.low} and less than {self.high}")


class LengthDistribution(Value, frozen=True):
    """Length distribution: `shares[i]` is the probability of [i * width, (i + 1) * width) output tokens; the last
    share covers all greater lengths too. Shares are not negative and add up to 1."""

    width: int
    shares: tuple[float, ...]


class Expected(Value, frozen=True):
    """What a worker knows about output lengths before it has served a request, from the training of its predictor.

    kind    classifier, hidden or both; "prior": no predictor, the prior alone
    prior   distribution of the output lengths in training
    levels  calibration, ascending: quantiles of the probability integral transform. Of the held-out texts, the share
            i / (len + 1) had at most `levels[i - 1]` of their predicted distribution at or below their true length
    note    one line for `status`: the predictor's file, or why there is none
    """

    kind: str
    prior: LengthDistribution
    levels: tuple[float, ...] = ()
    note: str = ""


class PredictorStatus(Record, frozen=True):
    """Accuracy record of a worker's length predictor. `on`: its predictions are used; otherwise the prior is. `note`:
    the predictor's file, and why it is off.

    predicted     requests that it predicted a length distribution for
    late          requests that went on before the prediction had arrived
    scored        predicted requests that have ended; of these:
    right         the length was in the likeliest bucket
    prior_right   the length was in the likeliest bucket of the prior
    inside        the length was below the high end of the range
    buckets       "2 3": how often bucket 2 of `length_granularity` tokens was the likeliest and the length was in
                  bucket 3; the last label stands for all greater ones too
    cut           prompts of which the classifier read only the two ends
    unread        prompts that the classifier skipped, since newer ones waited
    """

    kind: str
    on: bool
    note: str = ""
    predicted: Count = 0
    late: Count = 0
    scored: Count = 0
    right: Count = 0
    prior_right: Count = 0
    inside: Count = 0
    buckets: dict[str, Count] = {}
    cut: Count = 0
    unread: Count = 0


class StepRatio(Record, frozen=True):
    """How long a worker's engine steps take, over what its cost table predicts. None: not enough steps were compared,
    or there is nothing to compare them with."""

    prefill: float | None = None
    decode: float | None = None


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Number of blocks of `block_tokens` tokens that `tokens` tokens need."""
    return -(-tokens // block_tokens)
