"""The request table: the only place that knows where a request is. A dead worker's requests are found by one scan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tetri.core.actions import Broken
from tetri.request import Receipt, Sampling, Stage
from tetri.wire.clients import Delta, Done
from tetri.wire.messages import Finished


@dataclass(slots=True)
class Row:
    """One request. `prefill` and `decode` are the instances of the current attempt, None while there is none.
    Tokens pass three points: `output` came from workers, `asked` of them went to be worded, and of the
    `letters` (deltas and the Done at their end) `sent` were handed to the client."""

    rid: str
    key: str
    client: bytes | None
    prompt: tuple[int, ...]
    sampling: Sampling
    arrival: float
    stage: Stage
    stage_at: float
    attempt: int = 1
    prefill: str | None = None
    decode: str | None = None
    assigned_at: float = 0.0
    output: list[int] = field(default_factory=list)
    asked: int = 0  # output tokens handed over to be worded
    letters: list[Delta | Done] = field(default_factory=list)
    sent: int = 0
    blocked: bool = False  # the client's queue is full: nothing is sent before the retry
    watchers: list[bytes] = field(default_factory=list)  # other clients that asked for its end
    first_at: float | None = None
    spent: dict[Stage, float] = field(default_factory=dict)
    last: str | None = None  # why the last token of `output` ended it, as its worker said
    finished: Finished | None = None
    reason: str | None = None  # why it ends; set before the last words are back
    error: str | None = None

    def move(self, stage: Stage, now: float) -> None:
        """Enter a stage; what was spent in the one before is kept, over all attempts."""
        self.spent[self.stage] = self.spent.get(self.stage, 0.0) + now - self.stage_at
        self.stage, self.stage_at = stage, now

    def advance(self, stage: Stage, now: float) -> None:
        """As `move`, but never backwards: the news of two workers may overtake one another."""
        if _ORDER.index(stage) > _ORDER.index(self.stage):
            self.move(stage, now)

    @property
    def holder(self) -> str | None:
        """The instance that must have it now: the prefill one until all KV has landed at the decode one."""
        return self.decode if self.stage in (Stage.WAITING, Stage.DECODE) else self.prefill

    @property
    def full(self) -> bool:
        """Whether it has all its tokens, whether or not the `Finished` has come."""
        return self.last is not None or len(self.output) >= self.sampling.max_tokens

    @property
    def outstanding(self) -> int:
        """Prompt tokens that its prefill instance has still to compute, as far as the table knows."""
        done = self.prefill is None or self.stage not in (Stage.QUEUED, Stage.PREFILL)
        return 0 if done else len(self.prompt) + len(self.output)

    def receipt(self) -> Receipt:
        if self.finished is not None:
            made = self.finished.receipt
            fields = {name: getattr(made, name) for name in Receipt.__struct_fields__}
            return Receipt(**{**fields, "attempts": self.attempt})
        return Receipt(
            prompt_tokens=len(self.prompt),
            prefill_instance=self.prefill,
            decode_instance=self.decode,
            attempts=self.attempt,
        )


_ORDER = tuple(Stage)


class Table:
    """Open rows by rid and, until forgotten, ended ones, so that a client may ask again."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.keys: dict[str, str] = {}  # client's key -> rid
        self.open = 0

    def add(self, row: Row) -> None:
        self.rows[row.rid] = row
        self.keys[row.key] = row.rid
        self.open += 1

    def forget(self, rid: str) -> None:
        row = self.rows.pop(rid)
        if self.keys.get(row.key) == rid:
            del self.keys[row.key]

    def held_by(self, iid: str) -> list[Row]:
        return [row for row in self.rows.values() if not row.stage.ended and row.holder == iid]

    def active(self) -> Iterator[Row]:
        return (row for row in self.rows.values() if not row.stage.ended)

    def counts(self) -> dict[str, int]:
        """Open rows by stage."""
        counts: dict[str, int] = {}
        for row in self.active():
            counts[row.stage.value] = counts.get(row.stage.value, 0) + 1
        return counts

    def check(self) -> None:
        active = list(self.active())
        if len(active) != self.open:
            raise Broken(f"{self.open} rows counted as open, {len(active)} are")
        for key, rid in self.keys.items():
            if self.rows[rid].key != key:
                raise Broken(f"key {key} leads to {rid}, which has another")
        for row in active:
            if row.stage in (Stage.WAITING, Stage.DECODE) and row.decode is None:
                raise Broken(f"{row.rid} is in {row.stage} nowhere")
            if row.prefill is None and row.stage in (Stage.PREFILL, Stage.MOVING):
                raise Broken(f"{row.rid} is in {row.stage} nowhere")
            if len(row.output) > row.sampling.max_tokens or row.asked > len(row.output):
                raise Broken(f"{row.rid} has {len(row.output)} tokens, {row.asked} worded")
            if row.sent > len(row.letters):
                raise Broken(f"{row.rid} sent more than it had")
