"""The request table: the only record of where each choice of each request is. Every change of instance or stage goes
through `Table`, which maintains its indices: choices by instance, choices without an instance, and assigned prefill
work. It also has the account of the memory that the requests take."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hmac import compare_digest

from tetri.core.actions import Broken, Submitted
from tetri.core.broker.logprobs import Logprobs
from tetri.core.broker.outbox import Outbox
from tetri.request import AskedSampling, Receipt, Sampling, Slo, Stage, Token, TokenLogprob, Value, choice_id, token_ids
from tetri.wire.messages import End
from tetri.wire.packed_timelines import Moved, ReportedEvent, Steps

ON_DECODER = (Stage.WAITING, Stage.DECODE)
BEFORE_TOKENS = (Stage.QUEUED, Stage.PREFILL)
# What a request counts for in the account of memory: itself, each token of its prompt, each choice, and each token of a
# choice's output, more with log probabilities. TEXT_BYTES are for the text of an output token; the texts of a choice
# that are longer than that in all count too.
REQUEST_BYTES, PROMPT_BYTES, CHOICE_BYTES, OUTPUT_BYTES, TEXT_BYTES = 2048, 8, 2048, 24, 10
LOGPROB_BYTES, TOP_BYTES = 28, 13  # of an output token with a log probability; of each most likely token beside it
ID_BYTES = 128  # of each token id of logit_bias and stop_token_ids
NOTHING_ASKED = AskedSampling()
MOST_STEPS, MOST_EVENTS = 4096, 512  # of one choice
# What a trace counts for: itself with the moves of each attempt, each step that may follow (a reference, and its
# share of the step), and each event.
TRACE_BYTES, STEP_BYTES, EVENT_BYTES = 2048, 16, 500


def needed_bytes(prompt: int, output: int, n: int = 1, sampling: AskedSampling = NOTHING_ASKED) -> int:
    """The memory that a request of `n` choices counts for, with so many prompt tokens, and output tokens a choice."""
    return _request_bytes(prompt, sampling) + n * _choice_bytes(output, sampling.logprobs)


def _request_bytes(prompt: int, sampling: AskedSampling) -> int:
    ids = len(sampling.logit_bias) + len(sampling.stop_token_ids)
    return REQUEST_BYTES + PROMPT_BYTES * prompt + ID_BYTES * ids


def _choice_bytes(output: int, logprobs: int | None) -> int:
    token = OUTPUT_BYTES if logprobs is None else OUTPUT_BYTES + LOGPROB_BYTES + TOP_BYTES * logprobs
    return CHOICE_BYTES + token * output


@dataclass(slots=True, eq=False)
class Request:
    """What a client has submitted. `secret` and `content` are those of its Submit: who shows the secret is its client.
    Times are in seconds."""

    rid: str
    key: str
    client: bytes | None
    prompt: array[int]
    arrival: float
    deadline: float | None = None  # on the clock of `arrival`; None: no deadline
    slo: Slo = Slo()  # its limits of latency, found when it arrived
    secret: str = field(kw_only=True)
    content: bytes = field(kw_only=True)
    choices: list[Choice] = field(default_factory=list)
    avoid: list[str] = field(default_factory=list)  # instances between which KV of earlier attempts could not be moved
    gave_up: list[str] = field(default_factory=list)  # the prefill instance that gave up the last attempt, if one did
    # The workers that were lost while they held a choice of it, each by iid and incarnation (suspects.py).
    deaths: list[tuple[str, int]] = field(default_factory=list)
    accused: bool = False  # it ends soon as the killer of the last of them, unless that one comes back
    watchers: list[bytes] = field(default_factory=list)  # other clients that cancelled it: they get each Done too
    weight: int = 0  # bytes for it in the table's account

    @property
    def ended(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.stage.ended for choice in self.choices)

    @property
    def ended_at(self) -> float:
        """When the last choice entered its stage: of an ended request, when it ended."""
        return max(choice.stage_at for choice in self.choices)

    def owned_by(self, secret: str) -> bool:
        """Whether this is the secret of the request's client. The time that it takes does not tell how much of a wrong
        secret is right."""
        return compare_digest(self.secret.encode(), secret.encode())

    def repeated_by(self, event: Submitted) -> bool:
        """Whether a Submit with the request's key is a repetition of its own, and not another request."""
        return self.owned_by(event.secret) and self.content == event.content

    def left(self, now: float) -> float | None:
        """Seconds until the deadline, 0 if it has passed; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - now)


class Trace:
    """What has happened to a choice. `together`: ids and attempts of the choices with which it has shared a prefill.
    `decoded_by`: the last instance that has decoded it. `left_out`: steps and events for which there was no space."""

    __slots__ = ("decoded_by", "events", "left_out", "moves", "reserved", "steps", "together")

    def __init__(self, reserved: int) -> None:
        """`reserved`: bytes that it counts for."""
        self.reserved = reserved
        self.moves: list[Moved] = []
        self.events: list[ReportedEvent] = []
        self.steps: Steps = []
        self.together: frozenset[tuple[str, int]] = frozenset()
        self.decoded_by: str | None = None
        self.left_out = 0


class Move(Value, frozen=True):
    """Where a running choice is to go on, and the attempt that it is there."""

    to: str
    attempt: int


@dataclass(slots=True, eq=False)
class Choice:
    """One output of a request, which workers know by its `id`. `prefill` and `decode` are the instances of the current
    attempt, None while there is none; `work_ns` is its share of the predicted time of that prefill, in nanoseconds so
    that sums stay exact.
    Tokens pass three points: workers report them into `output`; `asked` of them have been sent to the detokenizer;
    their text comes back into the `outbox`, which knows how many of its messages have been sent to the client."""

    request: Request = field(repr=False)
    index: int
    sampling: Sampling
    id: str = field(init=False)
    stage: Stage = Stage.QUEUED
    stage_at: float = field(init=False)
    attempt: int = 1
    newest: int = 1  # the last attempt that was ever begun, here or by a move
    moved: int = 0  # attempts up to this one that were moves, whatever came of them: no attempts of their own
    move: Move | None = None
    probe: int = 0  # above 0: this attempt tries a failing prefill instance again (Lifecycle.breaker)
    not_counted: int = 0  # attempts that do not count towards `max_attempts`: their worker was lost
    prefill: str | None = None
    decode: str | None = None
    work_ns: int = 0
    assigned_after: int = 0  # serial of the Membership before its last Assign
    output: array[int] = field(default_factory=lambda: array("I"))
    logprobs: Logprobs | None = field(init=False)  # the output with log probabilities, if they were asked for
    continued: int = 0  # output tokens of earlier attempts
    asked: int = 0
    outbox: Outbox = field(init=False)
    first_at: float | None = None  # when the first token came
    last_at: float | None = None  # when the last one came
    trace: Trace | None = None  # what is kept of how it is served; None: there was no space for it
    spent: dict[Stage, float] = field(default_factory=dict)
    end: End | None = None  # as its worker reported with the last token
    reason: str | None = None  # end reason; set while the last text is still being detokenized
    error: str | None = None
    listed: str | None = None  # the instance that the table's index lists it under
    counted: str | None = None  # the instance whose prefill work includes it

    def __post_init__(self) -> None:
        request = self.request
        self.id, self.stage_at = choice_id(request.rid, self.index), request.arrival
        self.logprobs = None if self.sampling.logprobs is None else Logprobs(self.output)
        self.outbox = Outbox(request.rid, self.index, self.output if self.logprobs is None else self.logprobs)

    @property
    def holder(self) -> str | None:
        """The instance that must hold the choice: the prefill instance until all KV has landed at the decode one."""
        return self.decode if self.stage in ON_DECODER else self.prefill

    @property
    def attempts(self) -> int:
        """How often the choice has been tried. A move is no other try."""
        return self.attempt - self.moved

    @property
    def computing(self) -> str | None:
        """The prefill instance that still has to compute the prompt; None once a token is known."""
        return self.prefill if self.stage in BEFORE_TOKENS else None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None if there were fewer than two."""
        later = len(self.output) - 1
        if later < 1 or self.first_at is None or self.last_at is None:
            return None
        return (self.last_at - self.first_at) / later

    def extend(self, tokens: list[Token]) -> bool:
        """Append tokens to the output. False: it is with log probabilities, and these are without."""
        if self.logprobs is None:
            have = len(self.output)
            try:
                self.output.extend(tokens)  # type: ignore[arg-type]  # ids, as a rule: this is the usual case, fast
            except TypeError:
                del self.output[have:]
                self.output.extend(token_ids(tokens))
            return True
        found = [token for token in tokens if isinstance(token, TokenLogprob)]
        if len(found) < len(tokens):
            return False
        self.output.extend(token_ids(found))
        self.logprobs.add(found)
        return True

    def cut(self, tokens: int) -> None:
        """Keep only so many tokens of the output."""
        del self.output[tokens:]
        if self.logprobs is not None:
            self.logprobs.cut(tokens)

    def receipt(self) -> Receipt:
        """The receipt that the worker sent with the end. If no worker ended the choice, a receipt without KV data."""
        prompt_tokens, prefill, decode = len(self.request.prompt), self.prefill, self.decode
        own = Receipt(prompt_tokens=prompt_tokens, prefill_instance=prefill, decode_instance=decode)
        return (own if self.end is None else self.end.receipt).changed(
            attempts=self.attempts, continued=self.continued
        )


_RANK = {stage: rank for rank, stage in enumerate(Stage)}


class Table:
    """All requests by rid and all choices by id, until the request is forgotten, so that a client may ask again.

    `unplaced`: open choices without a prefill instance, in the order in which they came to be so. `work_ns`: predicted
    nanoseconds of prefill by instance, of all choices assigned to it that have no token of this attempt yet; an
    instance without such work is not in it. `moved` is called whenever a choice has entered a stage or has got another
    holder, `recount` whenever the work or the choices of an instance have changed. `weight`: the memory of all
    requests, in bytes. An open choice counts with all the output that it may still get, so the broker never needs more
    than it has accepted; an ended one with what it has."""

    def __init__(self, moved: Callable[[Choice, float], None], recount: Callable[[str], None]) -> None:
        self.moved, self.recount = moved, recount
        self.requests: dict[str, Request] = {}
        self.choices: dict[str, Choice] = {}
        self.keys: dict[str, str] = {}  # client's key -> rid
        self.unplaced: dict[str, Choice] = {}
        self.work_ns: dict[str, int] = {}
        self.weight = 0
        self._active: dict[str, Choice] = {}
        self._held: dict[str, dict[str, Choice]] = {}
        self._stages = dict.fromkeys(Stage, 0)

    @property
    def open(self) -> int:
        """Number of open choices."""
        return len(self._active)

    def named(self, name: str) -> Request | None:
        """The request with this rid, else that of the Submit with this key: its client may not know the rid yet."""
        return self.requests.get(name) or self.requests.get(self.keys.get(name, ""))

    def active(self) -> Iterable[Choice]:
        """The open choices, in order of arrival. Do not change the table while iterating."""
        return self._active.values()

    def held_by(self, iid: str) -> dict[str, Choice]:
        """The open choices that an instance must hold, by id. A live view: do not change or keep it."""
        return self._held.get(iid, _NONE)

    def counts(self) -> dict[str, int]:
        """Open choices by stage."""
        return {stage.value: count for stage, count in self._stages.items() if count}

    # ------------------------------------------------------------ changes

    def add(self, request: Request, now: float) -> None:
        """Add a new request with its choices."""
        self.requests[request.rid] = request
        self.keys[request.key] = request.rid
        for choice in request.choices:
            self.choices[choice.id] = self._active[choice.id] = choice
            self._stages[choice.stage] += 1
            self._list(choice)
            self.moved(choice, now)
        self.weigh(request)

    def forget(self, rid: str) -> None:
        """Remove an ended request."""
        request = self.requests.pop(rid)
        for choice in request.choices:
            del self.choices[choice.id]
        self.weight -= request.weight
        if self.keys.get(request.key) == rid:
            del self.keys[request.key]

    def assign(self, choice: Choice, iid: str, work_ns: int, now: float) -> None:
        """Assign a choice to a prefill instance; `work_ns` is its share of the predicted prefill, at least 1 ns."""
        self._count(choice, None)
        choice.prefill, choice.work_ns = iid, work_ns
        self._list(choice)
        self.moved(choice, now)

    def hand_over(self, choice: Choice, iid: str) -> None:
        """Set the decode instance of a choice."""
        choice.decode = iid
        self._list(choice)

    def migrate(self, choice: Choice, iid: str, attempt: int, now: float) -> None:
        """Let a choice go on at another decode instance, as this attempt."""
        choice.moved += attempt - choice.attempt
        choice.attempt, choice.decode = attempt, iid
        self._list(choice)
        self.moved(choice, now)

    def start_over(self, choice: Choice, now: float) -> None:
        """Begin another attempt, which no instance holds yet."""
        choice.moved += choice.newest - choice.attempt
        choice.attempt = choice.newest = choice.newest + 1
        choice.continued = len(choice.output)
        choice.prefill = choice.decode = None
        self.move(choice, Stage.QUEUED, now)

    def move(self, choice: Choice, stage: Stage, now: float) -> None:
        """Enter a stage. Adds the time spent in the stage before to `spent`, which covers all attempts."""
        choice.spent[choice.stage] = choice.spent.get(choice.stage, 0.0) + now - choice.stage_at
        self._stages[choice.stage] -= 1
        choice.stage, choice.stage_at = stage, now
        if stage.ended:
            del self._active[choice.id]
            self.weigh(choice.request)
        else:
            self._stages[stage] += 1
        self._list(choice)
        self.moved(choice, now)

    def advance(self, choice: Choice, stage: Stage, now: float) -> None:
        """As `move`, but never to an earlier stage: reports of two workers can arrive out of order."""
        if _RANK[stage] > _RANK[choice.stage]:
            self.move(choice, stage, now)

    def weigh(self, request: Request) -> None:
        """Update the account after a choice of a request has ended or its outbox has grown."""
        weight = _weight(request)
        self.weight += weight - request.weight
        request.weight = weight

    def _list(self, choice: Choice) -> None:
        """Update the indices after a choice has changed."""
        holder, computing, unplaced = _places(choice)
        if holder != choice.listed:
            if choice.listed is not None:
                held = self._held[choice.listed]
                del held[choice.id]
                if not held:
                    del self._held[choice.listed]
                self.recount(choice.listed)
            if holder is not None:
                self._held.setdefault(holder, {})[choice.id] = choice
                self.recount(holder)
            choice.listed = holder
        if computing != choice.counted:
            self._count(choice, computing)
        if unplaced:
            self.unplaced[choice.id] = choice
        else:
            self.unplaced.pop(choice.id, None)

    def _count(self, choice: Choice, iid: str | None) -> None:
        """Add the choice's work to this instance, or to none with None, and subtract it where it was counted."""
        if choice.counted is not None:
            self.work_ns[choice.counted] -= choice.work_ns
            if not self.work_ns[choice.counted]:
                del self.work_ns[choice.counted]
            self.recount(choice.counted)
        if iid is not None:
            self.work_ns[iid] = self.work_ns.get(iid, 0) + choice.work_ns
            self.recount(iid)
        choice.counted = iid

    # ------------------------------------------------------------ invariants

    def check(self) -> None:
        """Check choices and indices. Raises Broken."""
        for key, rid in self.keys.items():
            if self.requests[rid].key != key:
                raise Broken(f"key {key} leads to {rid}, which has another key")
        choices = {choice.id: choice for request in self.requests.values() for choice in request.choices}
        if choices != self.choices:
            raise Broken("the table's choices are not those of its requests")
        active = {name: choice for name, choice in choices.items() if not choice.stage.ended}
        self._check_indices(active)
        for choice in active.values():
            homeless = choice.stage in ON_DECODER and choice.decode is None
            if homeless or (choice.prefill is None and choice.stage in (Stage.PREFILL, Stage.MOVING)):
                raise Broken(f"{choice.id} is in stage {choice.stage} without an instance")
            if len(choice.output) > choice.sampling.max_tokens or choice.asked > len(choice.output):
                raise Broken(f"{choice.id} has {len(choice.output)} tokens, {choice.asked} sent to the detokenizer")
            if choice.outbox.unsent < 0 or choice.outbox.tokens > len(choice.output):
                raise Broken(f"{choice.id} has sent more messages than its outbox holds, or holds more than its output")
        weights = [_weight(request) for request in self.requests.values()]
        if weights != [request.weight for request in self.requests.values()] or self.weight != sum(weights):
            raise Broken("the account of memory is out of date")

    def _check_indices(self, active: dict[str, Choice]) -> None:
        """Compare the indices with a scan of all choices."""
        if active != self._active:
            raise Broken(f"the index has {self.open} open choices, a scan finds {len(active)}")
        held: dict[str, dict[str, Choice]] = {}
        work: dict[str, int] = {}
        stages = dict.fromkeys(Stage, 0)
        unplaced = {}
        for name, choice in active.items():
            holder, computing, unassigned = _places(choice)
            stages[choice.stage] += 1
            if holder is not None:
                held.setdefault(holder, {})[name] = choice
            if computing is not None:
                work[computing] = work.get(computing, 0) + choice.work_ns
            if unassigned:
                unplaced[name] = choice
        for name, kept, found in (
            ("choices by instance", self._held, held),
            ("prefill work by instance", self.work_ns, {iid: ns for iid, ns in work.items() if ns}),
            ("choices by stage", self._stages, stages),
            ("choices without a place", self.unplaced, unplaced),
        ):
            if kept != found:
                raise Broken(f"the table's {name} are out of date")


_NONE: dict[str, Choice] = {}


def _weight(request: Request) -> int:
    """The memory that a request counts for: more than was expected when its tokens have long texts."""
    weight = _request_bytes(len(request.prompt), request.choices[0].sampling)
    for choice in request.choices:
        output = len(choice.output) if choice.stage.ended else choice.sampling.max_tokens
        weight += _choice_bytes(output, choice.sampling.logprobs)
        weight += max(0, choice.outbox.text_bytes - TEXT_BYTES * output)
    return weight


def _places(choice: Choice) -> tuple[str | None, str | None, bool]:
    """The index entries of a choice: its holder, the instance whose work includes it, whether it waits for a place."""
    stage, prefill = choice.stage, choice.prefill
    if stage.ended:
        return None, None, False
    # As `Choice.holder` and `Choice.computing`, without a call: every message moves a choice.
    computing = prefill if stage in BEFORE_TOKENS else None
    return choice.decode if stage in ON_DECODER else prefill, computing, prefill is None
