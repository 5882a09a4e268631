"""The request table: the only record of where each request is. Every change of instance or stage goes through `Table`,
which maintains its indices: requests by instance, requests without an instance, and assigned prefill work. It also has
the account of the memory that the requests take."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hmac import compare_digest

from tetri.core.actions import Broken, Submitted
from tetri.core.broker.outbox import Outbox
from tetri.request import Receipt, Sampling, Stage
from tetri.wire.messages import End

ON_DECODER = (Stage.WAITING, Stage.DECODE)
BEFORE_TOKENS = (Stage.QUEUED, Stage.PREFILL)
# What a request counts for in the account of memory: itself, each token of its prompt and of its output. TEXT_BYTES are
# for the text of an output token; the texts of an answer that are longer than that in all count too.
REQUEST_BYTES, PROMPT_BYTES, OUTPUT_BYTES, TEXT_BYTES = 4096, 8, 24, 10


def needed_bytes(prompt: int, output: int) -> int:
    """The memory that a request with so many prompt and output tokens counts for."""
    return REQUEST_BYTES + PROMPT_BYTES * prompt + OUTPUT_BYTES * output


@dataclass(slots=True)
class Row:
    """One request. `secret` and `content` are those of its Submit: who shows the secret is its client.
    `prefill` and `decode` are the instances of the current attempt, None while there is none;
    `work_ns` is the predicted prefill time of that attempt, in nanoseconds so that sums stay exact.
    Tokens pass three points: workers report them into `output`; `asked` of them have been sent to the detokenizer;
    their text comes back into the `outbox`, which knows how many of its messages have been sent to the client. Times
    are in seconds."""

    rid: str
    key: str
    client: bytes | None
    prompt: array[int]
    sampling: Sampling
    arrival: float
    stage: Stage
    stage_at: float
    secret: str = field(kw_only=True)
    content: bytes = field(kw_only=True)
    deadline: float | None = None  # on the clock of `arrival`; None: no deadline
    attempt: int = 1
    avoid: list[str] = field(default_factory=list)  # instances between which KV of earlier attempts could not be moved
    probe: int = 0  # above 0: this attempt tries a failing prefill instance again (Lifecycle.breaker)
    not_counted: int = 0  # attempts that do not count towards `max_attempts`: their worker was lost
    # The workers that were lost while they held it, each by iid and incarnation (suspects.py).
    deaths: list[tuple[str, int]] = field(default_factory=list)
    accused: bool = False  # it ends soon as the killer of the last of them, unless that one comes back
    prefill: str | None = None
    decode: str | None = None
    work_ns: int = 0
    assigned_after: int = 0  # serial of the Membership before its last Assign
    output: array[int] = field(default_factory=lambda: array("I"))
    continued: int = 0  # how many of them are of earlier attempts
    asked: int = 0
    outbox: Outbox = field(init=False)
    weight: int = 0  # bytes for it in the table's account
    watchers: list[bytes] = field(default_factory=list)  # other clients that cancelled the request: they get its Done
    first_at: float | None = None
    spent: dict[Stage, float] = field(default_factory=dict)
    end: End | None = None  # as its worker reported with the last token
    reason: str | None = None  # end reason; set while the last text is still being detokenized
    error: str | None = None
    listed: str | None = None  # the instance that the table's index lists it under
    counted: str | None = None  # the instance whose prefill work includes it

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.rid, self.output)

    @property
    def holder(self) -> str | None:
        """The instance that must hold the request: the prefill instance until all KV has landed at the decode one."""
        return self.decode if self.stage in ON_DECODER else self.prefill

    @property
    def computing(self) -> str | None:
        """The prefill instance that still has to compute the request; None once a token is known."""
        return self.prefill if self.stage in BEFORE_TOKENS else None

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

    def receipt(self) -> Receipt:
        """The receipt that the worker sent with the end. If no worker ended the request, a receipt without KV data."""
        prompt_tokens, prefill, decode = len(self.prompt), self.prefill, self.decode
        own = Receipt(prompt_tokens=prompt_tokens, prefill_instance=prefill, decode_instance=decode)
        return (own if self.end is None else self.end.receipt).changed(
            attempts=self.attempt, continued=self.continued
        )


_RANK = {stage: rank for rank, stage in enumerate(Stage)}


class Table:
    """Open rows by rid and, until forgotten, ended ones, so that a client may ask again.

    `unplaced`: open rows without a prefill instance, in the order in which they came to be so. `work_ns`: predicted
    nanoseconds of prefill by instance, of all rows assigned to it that have no token of this attempt yet; an
    instance without such work is not in it. `weight`: the memory of all rows, in bytes. An open row counts with all the
    output that it may still get, so the broker never needs more than it has accepted; an ended one with what it has."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.keys: dict[str, str] = {}  # client's key -> rid
        self.unplaced: dict[str, Row] = {}
        self.work_ns: dict[str, int] = {}
        self.weight = 0
        self._active: dict[str, Row] = {}
        self._held: dict[str, dict[str, Row]] = {}
        self._stages = dict.fromkeys(Stage, 0)

    @property
    def open(self) -> int:
        """Number of open rows."""
        return len(self._active)

    def named(self, name: str) -> Row | None:
        """The row with this rid, else that of the Submit with this key: its client may not know the rid yet."""
        return self.rows.get(name) or self.rows.get(self.keys.get(name, ""))

    def active(self) -> Iterable[Row]:
        """The open rows, in order of arrival. Do not change the table while iterating."""
        return self._active.values()

    def held_by(self, iid: str) -> dict[str, Row]:
        """The open rows that an instance must hold, by rid. A live view: do not change or keep it."""
        return self._held.get(iid, _NONE)

    def counts(self) -> dict[str, int]:
        """Open rows by stage."""
        return {stage.value: count for stage, count in self._stages.items() if count}

    # ------------------------------------------------------------ changes

    def add(self, row: Row) -> None:
        """Add a new row."""
        self.rows[row.rid] = row
        self.keys[row.key] = row.rid
        self._active[row.rid] = row
        self.weigh(row)
        self._stages[row.stage] += 1
        self._list(row)

    def forget(self, rid: str) -> None:
        """Remove an ended row."""
        row = self.rows.pop(rid)
        self.weight -= row.weight
        if self.keys.get(row.key) == rid:
            del self.keys[row.key]

    def assign(self, row: Row, iid: str, work_ns: int) -> None:
        """Assign a row to a prefill instance; `work_ns` is its predicted prefill time, at least 1 ns."""
        self._count(row, None)
        row.prefill, row.work_ns = iid, work_ns
        self._list(row)

    def hand_over(self, row: Row, iid: str) -> None:
        """Set the decode instance of a row."""
        row.decode = iid
        self._list(row)

    def start_over(self, row: Row, now: float) -> None:
        """Begin another attempt, which no instance holds yet."""
        row.attempt += 1
        row.continued = len(row.output)
        row.prefill = row.decode = None
        self.move(row, Stage.QUEUED, now)

    def move(self, row: Row, stage: Stage, now: float) -> None:
        """Enter a stage. Adds the time spent in the stage before to `spent`, which covers all attempts."""
        row.spent[row.stage] = row.spent.get(row.stage, 0.0) + now - row.stage_at
        self._stages[row.stage] -= 1
        row.stage, row.stage_at = stage, now
        if stage.ended:
            del self._active[row.rid]
            self.weigh(row)
        else:
            self._stages[stage] += 1
        self._list(row)

    def advance(self, row: Row, stage: Stage, now: float) -> None:
        """As `move`, but never to an earlier stage: reports of two workers can arrive out of order."""
        if _RANK[stage] > _RANK[row.stage]:
            self.move(row, stage, now)

    def weigh(self, row: Row) -> None:
        """Update the account after a row has ended or its outbox has grown."""
        weight = _weight(row)
        if weight != row.weight:
            self.weight += weight - row.weight
            row.weight = weight

    def _list(self, row: Row) -> None:
        """Update the indices after a row has changed."""
        holder, computing, unplaced = _places(row)
        if holder != row.listed:
            if row.listed is not None:
                rows = self._held[row.listed]
                del rows[row.rid]
                if not rows:
                    del self._held[row.listed]
            if holder is not None:
                self._held.setdefault(holder, {})[row.rid] = row
            row.listed = holder
        if computing != row.counted:
            self._count(row, computing)
        if unplaced:
            self.unplaced[row.rid] = row
        else:
            self.unplaced.pop(row.rid, None)

    def _count(self, row: Row, iid: str | None) -> None:
        """Add the row's work to this instance, or to none with None, and subtract it where it was counted."""
        if row.counted is not None:
            self.work_ns[row.counted] -= row.work_ns
            if not self.work_ns[row.counted]:
                del self.work_ns[row.counted]
        if iid is not None:
            self.work_ns[iid] = self.work_ns.get(iid, 0) + row.work_ns
        row.counted = iid

    # ------------------------------------------------------------ invariants

    def check(self) -> None:
        """Check rows and indices. Raises Broken."""
        for key, rid in self.keys.items():
            if self.rows[rid].key != key:
                raise Broken(f"key {key} leads to {rid}, which has another key")
        active = {rid: row for rid, row in self.rows.items() if not row.stage.ended}
        self._check_indices(active)
        for row in active.values():
            homeless = row.stage in ON_DECODER and row.decode is None
            if homeless or (row.prefill is None and row.stage in (Stage.PREFILL, Stage.MOVING)):
                raise Broken(f"{row.rid} is in stage {row.stage} without an instance")
            if len(row.output) > row.sampling.max_tokens or row.asked > len(row.output):
                raise Broken(f"{row.rid} has {len(row.output)} tokens, {row.asked} sent to the detokenizer")
            if row.outbox.unsent < 0 or row.outbox.tokens > len(row.output):
                raise Broken(f"{row.rid} has sent more messages than its outbox holds, or holds more than its output")
        weights = {row.rid: _weight(row) for row in self.rows.values()}
        if weights != {row.rid: row.weight for row in self.rows.values()} or self.weight != sum(weights.values()):
            raise Broken("the account of memory is out of date")

    def _check_indices(self, active: dict[str, Row]) -> None:
        """Compare the indices with a scan of all rows."""
        if active != self._active:
            raise Broken(f"the index has {self.open} open rows, a scan finds {len(active)}")
        held: dict[str, dict[str, Row]] = {}
        work: dict[str, int] = {}
        stages = dict.fromkeys(Stage, 0)
        unplaced = {}
        for rid, row in active.items():
            holder, computing, unassigned = _places(row)
            stages[row.stage] += 1
            if holder is not None:
                held.setdefault(holder, {})[rid] = row
            if computing is not None:
                work[computing] = work.get(computing, 0) + row.work_ns
            if unassigned:
                unplaced[rid] = row
        for name, kept, found in (
            ("rows by instance", self._held, held),
            ("prefill work by instance", self.work_ns, {iid: ns for iid, ns in work.items() if ns}),
            ("rows by stage", self._stages, stages),
            ("rows without a place", self.unplaced, unplaced),
        ):
            if kept != found:
                raise Broken(f"the table's {name} are out of date")


_NONE: dict[str, Row] = {}


def _weight(row: Row) -> int:
    """The memory that a row counts for: more than was expected when its tokens have long texts."""
    output = len(row.output) if row.stage.ended else row.sampling.max_tokens
    return needed_bytes(len(row.prompt), output) + max(0, row.outbox.text_bytes - TEXT_BYTES * output)


def _places(row: Row) -> tuple[str | None, str | None, bool]:
    """The index entries of a row: its holder, the instance whose work includes it, whether it waits for placement."""
    if row.stage.ended:
        return None, None, False
    return row.holder, row.computing, row.prefill is None
