"""The timelines of choices: of open ones, and of the last ones that have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tetri.core.broker.requests import Choice
from tetri.core.broker.trace import (
    EVENT_BYTES,
    MOST_EVENTS,
    MOST_STEPS,
    MOVE_BYTES,
    STEP_BYTES,
    TRACE_BYTES,
    Entered,
    Trace,
    stage_spans,
)
from tetri.wire.kept import KeptTimeline, pack, unpack, unpack_steps
from tetri.wire.observation import Timeline, TraceEvent

MOST_KEPT = 10_000
KEPT_BYTES = 400  # of a timeline that is kept, besides what it is encoded into
BROKER = "broker"  # where the broker's own events happen
# What happens to the prefill and the transfer that choices share: workers report it for the first of these choices.
SHARED = frozenset(("chunk", "offered", "granted", "deferred", "refused", "export", "fetch"))


class Kept(NamedTuple):
    """The timeline of a choice whose request is forgotten."""

    arrival: float
    timeline: KeptTimeline

    @property
    def size(self) -> int:
        """Bytes that it counts for."""
        return KEPT_BYTES + self.timeline.size


class Timelines:
    """Traces choices while their requests are in the table, and keeps the timelines of those that are not any more: the
    last MOST_KEPT, in `most_bytes`. The traces of open choices take at most as much again; a choice beyond that gets
    none. `open_bytes` and `kept_bytes`: what they count for."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.open_bytes = self.kept_bytes = 0
        self._kept: dict[str, Kept] = {}  # by id, oldest first

    # ------------------------------------------------------------ traces

    def open(self, choice: Choice) -> None:
        """Begin the trace of a new choice, if there is space for it."""
        size = TRACE_BYTES + STEP_BYTES * min(choice.sampling.max_tokens, MOST_STEPS)
        if self.open_bytes + size <= self.most_bytes:
            self.open_bytes += size
            choice.trace = Trace(size)

    def moved(self, choice: Choice, now: float) -> None:
        """The choice has entered a stage, or has got another holder."""
        if choice.trace is not None:
            self._count(choice.trace, MOVE_BYTES)
            iid = "" if choice.stage.ended else choice.holder or ""
            choice.trace.moves.append(Entered(now, choice.stage, choice.attempt, iid))

    def own(self, choice: Choice, kind: str, now: float, iid: str = BROKER, peer: str = "", note: str = "") -> None:
        """Add an event that the broker knows of itself."""
        at = now - choice.request.arrival
        self._add(choice, TraceEvent(kind, choice.id, choice.attempt, at, iid, peer=peer, note=note))

    def traced(self, events: list[TraceEvent], iid: str, offset: float, choices: Mapping[str, Choice]) -> None:
        """Add what a worker has traced. `offset`: by which the broker's clock is ahead of the worker's."""
        for event in events:
            choice = choices.get(event.rid)
            if choice is None:
                continue  # a canary, or forgotten
            at = event.at + offset - choice.request.arrival
            known = TraceEvent(
                *(event.kind, choice.id, event.attempt, at, iid, event.seconds, event.peer),
                *(event.first, event.last, event.size, event.note),
            )
            self._add(choice, known)
            if len(choice.request.choices) > 1 and event.kind in SHARED:
                led = choice.id, event.attempt
                for each in choice.request.choices:
                    if each.trace is not None and led in each.trace.leads:
                        self._add(each, known)

    def shared(self, choices: Sequence[Choice]) -> None:
        """These choices share the prefill of the first one."""
        lead = choices[0].id, choices[0].attempt
        for choice in choices[1:]:
            if choice.trace is not None:
                choice.trace.leads += (lead,)

    def decodes(self, choice: Choice, iid: str, now: float) -> None:
        """The choice is decoded at this instance from now on."""
        trace = choice.trace
        if trace is None:
            return
        if trace.decoded_by not in (None, iid):
            self.own(choice, "migrated", now, iid, peer=trace.decoded_by or "")
        trace.decoded_by = iid

    def _add(self, choice: Choice, event: TraceEvent) -> None:
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

    # ------------------------------------------------------------ the end

    def keep(self, choice: Choice, now: float) -> None:
        """The choice is about to be forgotten: keep its timeline in little memory, and drop the oldest ones."""
        trace = choice.trace
        if trace is None:
            return
        self.open_bytes -= trace.reserved
        kept = Kept(choice.request.arrival, pack(self._known(choice, now), trace.steps, len(trace.steps)))
        choice.trace = None
        self._kept[choice.id] = kept
        self.kept_bytes += kept.size
        while self._kept and (len(self._kept) > MOST_KEPT or self.kept_bytes > self.most_bytes):
            self.kept_bytes -= self._kept.pop(next(iter(self._kept))).size

    # ------------------------------------------------------------ the answer

    def timeline(self, name: str, choice: Choice | None, now: float) -> Timeline | None:
        """The timeline of the choice with the id `name`, which is in the table or not; None if none is kept."""
        if choice is None:
            kept = self._kept.get(name)
            return None if kept is None else unpack(kept.timeline, kept.arrival, now)
        known, trace = self._known(choice, now), choice.trace
        if trace is None:
            return known
        return known.changed(steps=unpack_steps(trace.steps, len(trace.steps), choice.request.arrival))

    def _known(self, choice: Choice, now: float) -> Timeline:
        """The timeline without its steps."""
        request, trace, done = choice.request, choice.trace, choice.outbox.done
        return Timeline(
            rid=request.rid,
            choice=choice.index,
            choices=len(request.choices),
            age_s=now - request.arrival,
            prompt_tokens=len(request.prompt),
            outputs=len(choice.output),
            attempts=choice.attempt,
            stage=choice.stage,
            reason=None if done is None else done.reason,
            error=None if done is None else done.error,
            ttft_s=None if choice.first_at is None else choice.first_at - request.arrival,
            jct_s=None if done is None else done.jct_s,
            receipt=None if done is None else done.receipt,
            stages=[] if trace is None else stage_spans(trace.moves, request.arrival, now),
            events=[] if trace is None else sorted(trace.events, key=lambda event: event.at),
            left_out=0 if trace is None else trace.left_out,
        )
