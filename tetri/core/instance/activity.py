"""What an instance does: counts since its start, and what happens to its choices, for its heartbeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tetri.wire.observation import Activity, EngineStep, TraceEvent, Transferred

MOST_EVENTS = 2000  # that a heartbeat carries; further ones are left out
MOST_NOTE = 200  # characters of a note: a peer may send more


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


@dataclass(slots=True)
class _Received:
    """What came over one path, as in `Transferred`."""

    chunks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failed: int = 0

    def report(self) -> Transferred:
        return Transferred(chunks=self.chunks, bytes=self.bytes, seconds=self.seconds, failed=self.failed)


class ActivityLog:
    """Counts what an instance does, and traces what happens to its choices until the next heartbeat. Its prefill and
    decode phases share one. Choices that share a prefill or a transfer are traced by their lead: the first of them that
    goes on there. The counts are those of `Activity`.

    now     the time of the event that the worker handles, in seconds of its clock
    step    the last engine step
    traces  whether it traces anything
    """

    def __init__(self, now: float, *, traces: bool = True) -> None:
        self.now, self.traces = now, traces
        self.step = EngineStep(now, 0.0, 0)
        self.step_s = 0.0
        self.decode_tokens = self.preempted = 0
        self._decode_steps = self._other_steps = self._recomputed = 0
        self._chunk_steps = self._chunk_tokens = self._chunk_space = 0
        self._step_tokens = 0  # of the last step, if it had spans
        self._received: dict[str, _Received] = {}  # by path
        self._events: list[TraceEvent] = []
        self._left_out = 0

    # ------------------------------------------------------------ engine steps

    def step_done(self, seconds: float, batch: int, passes: int) -> None:
        """Count a step that ends now. `batch`: output tokens that each of its passes wrote for decode requests."""
        self.step = EngineStep(self.now, seconds, batch, 0, passes)
        if batch:
            self._decode_steps += passes
            self.step_s += seconds

    def spans_done(self, chunk_tokens: int, chunk_space: int, recomputed: int) -> None:
        """Count the tokens of the last step's spans: of its chunk, for which there was so much space, and those of
        preempted decode requests."""
        step = self.step
        self._step_tokens = step.batch + chunk_tokens + recomputed
        self._recomputed += recomputed
        if not step.batch:
            self._other_steps += 1
            self.step_s += step.seconds
        if chunk_tokens:
            self.step = EngineStep(step.at, step.seconds, step.batch, chunk_tokens)
            self._chunk_steps += 1
            self._chunk_tokens += chunk_tokens
            self._chunk_space += max(chunk_space, chunk_tokens)  # when memory is short, chunks are not as planned

    def computed(self, kind: str, choice: Choice, first: int, last: int) -> None:
        """Trace tokens [first, last) of a choice that the last step has computed."""
        self.add(kind, choice, self.now - self.step.seconds, "", first, last, self._step_tokens)

    # ------------------------------------------------------------ all else

    def fetched(
        self, choice: Choice, since: float, peer: str, first: int, last: int, size: int, path: str, problem: str | None
    ) -> None:
        """Count and trace a fetch of KV blocks [first, last) of `size` bytes."""
        received = self._received.get(path)
        if received is None:
            received = self._received[path] = _Received()
        if problem is None:
            received.chunks += 1
            received.bytes += size
            received.seconds += self.now - since
            self.add("fetch", choice, since, peer, first, last, size, path)
        else:
            received.failed += 1
            self.add("fetch", choice, since, peer, first, last, 0, f"{path}: {problem}")

    def happened(self, kind: str, choice: Choice, peer: str = "", note: str = "") -> None:
        """Trace what happens now."""
        if self.traces:
            self.add(kind, choice, self.now, peer, 0, 0, 0, note[:MOST_NOTE])

    def add(
        self, kind: str, choice: Choice, since: float, peer: str, first: int, last: int, size: int, note: str = ""
    ) -> None:
        """Trace what has lasted from `since` until now."""
        if not self.traces:
            return
        events, rid, attempt = self._events, choice.rid, choice.attempt
        if len(events) < MOST_EVENTS:
            seconds = self.now - since
            events.append(TraceEvent(kind, rid, attempt, since, "", seconds, peer, first, last, size, note))
        else:
            self._left_out += 1

    # ------------------------------------------------------------ reports

    def report(self) -> Activity:
        """The counts."""
        return Activity(
            steps=self._decode_steps + self._other_steps,
            step_s=self.step_s,
            chunk_steps=self._chunk_steps,
            chunk_tokens=self._chunk_tokens,
            chunk_space=self._chunk_space,
            decode_steps=self._decode_steps,
            decode_tokens=self.decode_tokens,
            recomputed=self._recomputed,
            preempted=self.preempted,
            received={path: each.report() for path, each in self._received.items()},
            events_left_out=self._left_out,
        )

    def traced(self) -> list[TraceEvent]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events
