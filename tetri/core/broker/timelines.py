"""The timelines of choices: of open ones, and of the last ones that have ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tetri.core.actions import Broken
from tetri.core.broker.requests import (
    EVENT_BYTES,
    MOST_EVENTS,
    MOST_STEPS,
    STEP_BYTES,
    TRACE_BYTES,
    Choice,
    Trace,
)
from tetri.wire.observation import Timeline, TraceEvent
from tetri.wire.packed_timelines import Facts, Packed, ReportedEvent, pack, timeline, unpacked

MOST_KEPT = 10_000
KEPT_BYTES = 400  # of a timeline that is kept, besides what it is encoded into
BROKER = "broker"  # where the broker's own events happen
# What happens to the prefill and the transfer that choices share: workers report it for one of these choices.
SHARED = frozenset(("chunk", "offered", "granted", "deferred", "refused", "export", "fetch"))


class Timelines:
    """Traces choices while their requests are in the table, and keeps the timelines of those that are not any more: the
    last MOST_KEPT, in `most_bytes`. The traces of open choices take at most as much again; a choice beyond that gets
    none. `open_bytes` and `kept_bytes`: what they count for."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.open_bytes = self.kept_bytes = 0
        self._kept: dict[str, Packed] = {}  # by id, oldest first

    # ------------------------------------------------------------ traces

    def open(self, choice: Choice) -> None:
        """Begin the trace of a new choice, if there is space for it."""
        size = TRACE_BYTES + STEP_BYTES * min(choice.sampling.max_tokens, MOST_STEPS)
        if self.open_bytes + size <= self.most_bytes:
            self.open_bytes += size
            choice.trace = Trace(size)

    def own(self, choice: Choice, kind: str, now: float, iid: str = BROKER, peer: str = "", note: str = "") -> None:
        """Add an event that the broker knows of itself."""
        self._add(choice, (0.0, iid, TraceEvent(kind, choice.id, choice.attempt, now, peer=peer, note=note)))

    def retried(self, choice: Choice, why: str, now: float) -> None:
        """Another attempt has begun."""
        if choice.trace is not None:
            self._count(choice.trace, TRACE_BYTES)
            self.own(choice, "retry", now, note=why)

    def traced(self, events: list[TraceEvent], iid: str, offset: float, choices: Mapping[str, Choice]) -> None:
        """Add what a worker has traced. `offset`: by which the broker's clock is ahead of the worker's."""
        for event in events:
            choice = choices.get(event.rid)
            if choice is None:
                continue  # a canary, or forgotten
            reported = offset, iid, event
            self._add(choice, reported)
            if len(choice.request.choices) > 1 and event.kind in SHARED:
                for each in choice.request.choices:
                    if each is not choice and _shares(each, event, event.at + offset):
                        self._add(each, reported)

    def shared(self, choices: Sequence[Choice]) -> None:
        """These choices share a prefill."""
        if len(choices) > 1:
            together = {(choice.id, choice.attempt) for choice in choices}
            for choice in choices:
                if choice.trace is not None:
                    choice.trace.together |= together

    def decodes(self, choice: Choice, iid: str, now: float) -> None:
        """The choice is decoded at this instance from now on."""
        trace = choice.trace
        if trace is None:
            return
        if trace.decoded_by not in (None, iid):
            self.own(choice, "migrated", now, iid, peer=trace.decoded_by or "")
        trace.decoded_by = iid

    def _add(self, choice: Choice, event: ReportedEvent) -> None:
        trace = choice.trace
        if trace is None:
            return
        if len(trace.events) >= MOST_EVENTS or self.open_bytes + EVENT_BYTES > self.most_bytes:
            trace.left_out += 1
            return
        trace.events.append(event)
        self._count(trace, EVENT_BYTES)

    def _count(self, trace: Trace, size: int) -> None:
        trace.reserved += size
        self.open_bytes += size

    def check(self, choices: Iterable[Choice]) -> None:
        """Check the memory of the traces of all choices in the table. Raises Broken."""
        if self.open_bytes != sum(choice.trace.reserved for choice in choices if choice.trace is not None):
            raise Broken("the account of open timelines is out of date")

    # ------------------------------------------------------------ the end

    def keep(self, choice: Choice) -> None:
        """The choice is about to be forgotten: keep its timeline in little memory, and drop the oldest ones."""
        trace = choice.trace
        if trace is None:
            return
        self.open_bytes -= trace.reserved
        packed = pack(_facts(choice), trace.steps)
        choice.trace = None
        self._kept[choice.id] = packed
        self.kept_bytes += packed.size + KEPT_BYTES
        while self._kept and (len(self._kept) > MOST_KEPT or self.kept_bytes > self.most_bytes):
            self.kept_bytes -= self._kept.pop(next(iter(self._kept))).size + KEPT_BYTES

    # ------------------------------------------------------------ the answer

    def timeline(self, name: str, choice: Choice | None, now: float) -> Timeline | None:
        """The timeline of the choice with the id `name`, which is in the table or not; None if none is kept."""
        if choice is not None:
            steps = [] if choice.trace is None else choice.trace.steps
            return timeline(_facts(choice), steps, len(steps), now)
        packed = self._kept.get(name)
        return None if packed is None else unpacked(packed, now)


def _shares(choice: Choice, event: TraceEvent, at: float) -> bool:
    """Whether a choice shares what was reported for its lead. It may have ended before: the others then have gone on,
    perhaps to another instance."""
    trace, done = choice.trace, choice.outbox.done
    together = trace is not None and (event.rid, event.attempt) in trace.together
    return together and (done is None or at <= choice.request.arrival + done.jct_s)


def _facts(choice: Choice) -> Facts:
    request, trace = choice.request, choice.trace
    return Facts(
        *(request.rid, choice.index, len(request.choices), request.arrival, choice.first_at, choice.tpot_s),
        *(len(request.prompt), len(choice.output), choice.attempts, choice.stage, choice.outbox.done),
        *(([], [], 0) if trace is None else (trace.moves, trace.events, trace.left_out)),
        request.slo,
    )
