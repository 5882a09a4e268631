"""What an instance does: counts since its start, and what happens to its choices, for its heartbeats."""

from __future__ import annotations

from typing import Protocol

from tetri.wire.observation import Activity, EngineStep, TraceEvent, Transferred

MOST_EVENTS = 2000  # that a heartbeat carries; further ones are left out
MOST_NOTE = 200  # characters of a note: a peer may send more
COUNTED = (
    "steps",
    "chunk_steps",
    "chunk_tokens",
    "chunk_space",
    "decode_steps",
    "decode_tokens",
    "recomputed",
    "preempted",
    "events_left_out",
)


class Choice(Protocol):
    """One attempt of a choice, in whichever phase."""

    @property
    def rid(self) -> str:
        """The id of the choice."""
        ...

    @property
    def attempt(self) -> int:
        """The number of the attempt."""
        ...


class ActivityLog:
    """Counts what an instance does, and traces what happens to its choices until the next heartbeat. Its prefill and
    decode phases share one. Choices that share a prefill or a transfer are traced by their lead: the first of them that
    goes on there.

    now       the time of the event that the worker handles, in seconds of its clock
    step      the last engine step
    totals    the counts of `Activity`
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self.step = EngineStep(now, 0.0, 0)
        self.totals = dict.fromkeys(COUNTED, 0)
        self._step_s = 0.0
        self._step_tokens = 0  # of the last step
        self._received: dict[str, Transferred] = {}
        self._events: list[TraceEvent] = []

    # ------------------------------------------------------------ engine steps

    def step_done(
        self, began: float, batch: int, passes: int, chunk_tokens: int = 0, chunk_space: int = 0, recomputed: int = 0
    ) -> None:
        """Count a step that ends now. `batch`: output tokens that each of its passes wrote for decode requests.
        `chunk_space`: tokens that the chunk could have had. `recomputed`: tokens of preempted decode requests."""
        seconds, totals = self.now - began, self.totals
        self.step = EngineStep(self.now, seconds, batch, chunk_tokens, passes)
        self._step_tokens = tokens = batch + chunk_tokens + recomputed
        if tokens:
            totals["steps"] += passes
            self._step_s += seconds
        if batch:
            totals["decode_steps"] += passes
        if chunk_tokens:
            totals["chunk_steps"] += 1
            totals["chunk_tokens"] += chunk_tokens
            totals["chunk_space"] += max(chunk_space, chunk_tokens)  # when memory is short, chunks differ from the plan
        totals["recomputed"] += recomputed

    def computed(self, kind: str, choice: Choice, first: int, last: int) -> None:
        """Trace tokens [first, last) of a choice that the last step has computed."""
        step = self.step
        self.add(kind, choice, step.at - step.seconds, first=first, last=last, size=self._step_tokens)

    # ------------------------------------------------------------ all else

    def received(self, path: str, size: int, since: float) -> None:
        """Count a KV chunk that has come over `path`."""
        was = self._received.get(path, Transferred())
        seconds = was.seconds + self.now - since
        self._received[path] = Transferred(was.chunks + 1, was.bytes + size, seconds, was.failed)

    def not_received(self, path: str) -> None:
        """Count a fetch over `path` that gave no valid chunk."""
        was = self._received.get(path, Transferred())
        self._received[path] = Transferred(was.chunks, was.bytes, was.seconds, was.failed + 1)

    def add(
        self,
        kind: str,
        choice: Choice,
        since: float | None = None,
        *,
        peer: str = "",
        first: int = 0,
        last: int = 0,
        size: int = 0,
        note: str = "",
    ) -> None:
        """Trace what has lasted from `since` until now, or an instant."""
        if len(self._events) == MOST_EVENTS:
            self.totals["events_left_out"] += 1
            return
        at = self.now if since is None else since
        self._events.append(
            TraceEvent(
                *(kind, choice.rid, choice.attempt, at, "", self.now - at),
                *(peer, first, last, size, note[:MOST_NOTE]),
            )
        )

    # ------------------------------------------------------------ reports

    def report(self) -> Activity:
        """The counts."""
        return Activity(**self.totals, step_s=self._step_s, received=dict(self._received))

    def traced(self) -> list[TraceEvent]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events
