"""What a request is: its sampling, its stages, its receipt. Used on the wire, in every core and by the client.

One vocabulary for the request table, the timeline, metrics, logs and the simulator:
QUEUED -> PREFILL -> MOVING -> WAITING -> DECODE -> DONE | FAILED | CANCELLED.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(max_length=128)]  # of a request, an instance, a client's key
Address = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0)]

ROLES = ("prefill", "decode", "mixed")  # which new work an instance takes; mixed takes both
PREFILL_ROLES = ("prefill", "mixed")
DECODE_ROLES = ("decode", "mixed")


class Record(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every value that crosses a process border: immutable, and strict when read."""


class Value(Struct, frozen=True):
    """Base of small values that cores pass on by the million: made eight times as fast as a frozen dataclass."""


class Stage(StrEnum):
    QUEUED = "queued"  # accepted, no worker computes it yet
    PREFILL = "prefill"  # its first chunk was scheduled
    MOVING = "moving"  # first token known, KV blocks still on their way
    WAITING = "waiting"  # the decode worker holds all KV and the first token
    DECODE = "decode"  # in the running batch
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in _ENDED


_ENDED = frozenset((Stage.DONE, Stage.FAILED, Stage.CANCELLED))


class Sampling(Record, frozen=True):
    """How output tokens are drawn. `temperature` 0 is greedy; `seed` makes a drawn text repeatable."""

    max_tokens: int = 128
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


# field, lowest, highest, both allowed
_RANGES: tuple[tuple[str, float, float], ...] = (
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
MAX_STOPS = 16
MAX_STOP_CHARS = 256


def sampling_problem(s: Sampling) -> str | None:
    """The first thing wrong with a Sampling, in one line that says what is allowed; None when it is fine."""
    for name, low, high in _RANGES:
        value = getattr(s, name)
        if not low <= value <= high:  # also catches NaN
            bound = f"at least {low:g}" if value < low else f"from {low:g} to {high:g}"
            return f"{name} must be {bound}, got {_described(value)}"
    if not 0.0 < s.top_p <= 1.0:
        return f"top_p must be above 0 and at most 1, got {_described(s.top_p)}"
    if s.seed is not None and not 0 <= s.seed < 1 << 63:
        return f"seed must be from 0 to 2^63 - 1, got {s.seed if abs(s.seed) < _LARGE else _described(s.seed)}"
    if s.min_tokens > s.max_tokens:
        return f"min_tokens ({s.min_tokens}) must not exceed max_tokens ({s.max_tokens})"
    if len(s.stop) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in s.stop):
        return f"stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters"
    return None


def _described(value: float) -> str:
    if isinstance(value, int) and abs(value) >= _LARGE:
        return "a number of many digits"  # which Python would refuse to write
    return f"{value:g}"


class Turn(Record, frozen=True):
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Receipt(Record, frozen=True):
    """What really happened to a request's KV: `adopted` prompt tokens came as KV bytes, `recomputed` ones
    were scheduled again by the decode engine itself (0 unless it was preempted). `refetched`: how often a chunk was
    taken again since it had come out wrong. `transport`: "none" if no KV moved.

    Only the worker that ended the request knows these. They are None, all of them, where no worker did: it was
    cancelled, failed, ran out of time, or a stop text was found before.
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


class Usage(Record, frozen=True):
    prompt_tokens: int
    completion_tokens: int


class Fingerprint(Record, frozen=True):
    """What two engines must share before KV bytes of one mean anything to the other (design.md, section 5)."""

    engine: str
    version: str
    isa: str
    model: str
    weights: str
    dtype: str
    kv_dtype: str
    block_tokens: int
    block_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    parallel: int = 1


def difference(a: Fingerprint, b: Fingerprint) -> str | None:
    """Name the first field in which two fingerprints differ; None when KV may move between them."""
    for name in Fingerprint.__struct_fields__:
        left, right = getattr(a, name), getattr(b, name)
        if left != right:
            return f"{name} differs: {left} and {right}"
    return None


class Reach(Record, frozen=True):
    """Where an instance's KV can be read, and from where it can read: `paths` are the transports that it has
    (policy/pairing.py), `segment` names its slab, unique to this start of the process.

    host      the same for all that share a machine, its shared memory and a user
    process   the same for all in one process of that host
    address   where it serves the path `stream`, else empty
    device    UUID of the GPU that holds the slab, empty for host memory; `near`: those that this GPU can access
    tickets   what other paths need to open the slab, by path
    """

    paths: list[str]
    host: str
    process: int
    segment: str
    address: str = ""
    device: str = ""
    near: list[str] = []
    tickets: dict[str, bytes] = {}


class LengthRange(Record, frozen=True):
    """Predicted output tokens of a request, all attempts together: at least `low`, less than `high`."""

    low: Count
    high: Positive

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"no length is at least {self.low} and less than {self.high}")


class LengthDistribution(Value, frozen=True):
    """How likely each number of output tokens is: `shares[i]` for [i * width, (i + 1) * width), the last share for all
    from there on. They are not negative and add up to 1."""

    width: int
    shares: tuple[float, ...]


class Expected(Value, frozen=True):
    """What a worker knows of output lengths before any traffic, from the training of its predictor.

    kind    classifier, hidden or both; "prior": no predictor, the prior alone
    prior   the lengths that the model wrote in training
    levels  calibration: of the held-out texts, the share i / (len + 1) had at most `levels[i - 1]` of their predicted
            odds at or below their true length (the quantiles of the probability integral transform), ascending
    note    one line for `status`: which file, or why there is none
    """

    kind: str
    prior: LengthDistribution
    levels: tuple[float, ...] = ()
    note: str = ""


class PredictorStatus(Record, frozen=True):
    """How a worker's predictor of output lengths does. `on`: its answers are used, else the prior's are; `note`: which
    file it came from, and why it is off.

    predicted     requests that it named odds for; `late`: those that went on before it had
    scored        of the predicted, the ones that have ended; of these:
    right         their length was in the likeliest bucket; `prior_right`: in the likeliest one of the prior
    inside        they ended below the high end of their range
    buckets       "2 3": how often bucket 2 of `length_granularity` tokens was the likeliest and bucket 3 came; the last
                  label that is told apart stands for all beyond

    Of the prompts that a classifier was asked about, `cut`: it read the two ends alone; `unread`: it came to none of
    it, since newer ones waited.
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


class Capacity(Record, frozen=True):
    """What one engine can hold: `blocks` KV blocks in all, `chunk_tokens` a step, `max_batch` decodes at once."""

    blocks: Positive
    block_tokens: Positive
    chunk_tokens: Positive
    max_batch: Positive
    context: Positive  # tokens, prompt and output together

    @property
    def tokens(self) -> int:
        """How many the memory holds."""
        return self.blocks * self.block_tokens


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_tokens)


def with_seed(sampling: Sampling, seed: int) -> Sampling:
    return replace(sampling, seed=seed)


def with_attempts(receipt: Receipt, attempts: int) -> Receipt:
    """The same receipt for so many attempts: a worker knows of its own one only."""
    return replace(receipt, attempts=attempts)
