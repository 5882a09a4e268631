"""The observer: measures how requests fare and remembers what has happened, for people and their tools. The broker's
other parts tell it; none of them asks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetri.core.broker.history import History
from tetri.core.broker.measures import Meters
from tetri.core.broker.membership import Member
from tetri.core.broker.requests import MOST_STEPS, Choice, Request, Trace
from tetri.core.broker.timelines import Timelines
from tetri.wire.clients import Done, Observation, Status
from tetri.wire.messages import Heartbeat, Tokens
from tetri.wire.observation import EngineStep, StepSpan
from tetri.wire.packed_timelines import pack_step


class Observer:
    """Takes note of what happens to choices and instances. Times are in seconds."""

    def __init__(self, epoch: int, timelines_mib: int) -> None:
        """`epoch`: of this start of the broker. `timelines_mib`: memory for the timelines of ended choices."""
        self.epoch = epoch
        self.meters, self.history, self.timelines = Meters(), History(), Timelines(timelines_mib << 20)

    # ------------------------------------------------------------ choices

    def refused(self, reason: str) -> None:
        """A Submit was refused, for one of the reasons of `requests_refused`."""
        self.meters.count("requests_refused", reason)

    def accepted(self, request: Request) -> None:
        """A request is about to enter the table."""
        for choice in request.choices:
            self.timelines.open(choice)

    def moved(self, choice: Choice, now: float) -> None:
        """A choice has entered a stage, or has got another holder."""
        iid, outputs = choice.listed or "", len(choice.output)
        move = self.history.moved(choice.id, choice.stage, iid, choice.attempt, outputs, now)
        if choice.trace is not None:
            choice.trace.moves.append(move)

    def placed(self, choices: Sequence[Choice], queued_s: float) -> None:
        """Choices that share a prefill were assigned to an instance with `queued_s` seconds of predicted prefill
        work."""
        self.meters.histograms["queue_predicted"].add(queued_s, len(choices))
        self.timelines.shared(choices)

    def retried(self, choice: Choice, reason: str, why: str, now: float) -> None:
        """Another attempt has begun, for one of the reasons of `retries`."""
        self.meters.count("retries", reason)
        self.timelines.retried(choice, why, now)

    def decodes(self, choice: Choice, iid: str, now: float) -> None:
        """All KV of a choice has landed at the instance that decodes it from now on."""
        self.timelines.decodes(choice, iid, now)

    def step(self, event: Tokens, member: Member, now: float) -> StepTokens:
        """The tokens of an engine step have come. Call `wrote` for each choice, then `close`."""
        step = event.step
        offset = 0.0 if step is None else member.clock.seen(step.at, now)
        return StepTokens(self.meters, now, event.iid, step, offset)

    def traced(self, event: Heartbeat, member: Member, choices: Mapping[str, Choice], now: float) -> None:
        """A worker has traced what has happened to choices."""
        self.timelines.traced(event.traced, event.iid, member.clock.seen(event.at, now), choices)

    def ended(self, choice: Choice, done: Done, now: float) -> None:
        """A choice has ended."""
        tpot_s = choice.tpot_s
        self.meters.ended(done, tpot_s)
        self.history.ended(choice.id, done, tpot_s, choice.prefill or "", choice.decode or "", now)

    def forgotten(self, request: Request) -> None:
        """An ended request is about to leave the table."""
        for choice in request.choices:
            self.timelines.keep(choice)

    # ------------------------------------------------------------ instances

    def happened(self, kind: str, iid: str, note: str, now: float) -> None:
        """Something happened to an instance: one of the kinds of ClusterEvent."""
        self.history.happened(kind, iid, note, now)

    def role_changed(self, iid: str, was: str, role: str, took_s: float, now: float) -> None:
        """A change of role was carried out."""
        self.meters.count("role_changes", f"{was}>{role}")
        self.happened("role", iid, f"{was} > {role} in {took_s:.2f} s", now)

    # ------------------------------------------------------------ the answer

    def observation(self, status: Status, epoch: int, since: int, now: float) -> Observation:
        """The answer to an Observe. After a restart of the broker `since` has no meaning here: all is told."""
        found = self.history.since(since if epoch == self.epoch else 0, now)
        return Observation(
            epoch=self.epoch,
            serial=self.history.serial,
            status=status,
            measures=self.meters.measures(),
            moves=found.moves,
            ended=found.ended,
            events=found.events,
            missed=found.missed,
        )


class StepTokens:
    """The output tokens of one engine step, as they reach the broker. What most choices have in common is made once:
    the bytes of the step, and the time since the token before. Runs for every token of every request."""

    __slots__ = ("_iid", "_itl", "_now", "_offset", "_packed", "_since", "_step", "_times", "_ttft")

    def __init__(self, meters: Meters, now: float, iid: str, step: EngineStep | None, offset: float) -> None:
        """`offset`: by which the broker's clock is ahead of that of the step."""
        self._itl, self._ttft = meters.histograms["itl"], meters.histograms["ttft"]
        self._now, self._iid, self._step, self._offset = now, iid, step, offset
        self._since, self._times = now, 0  # of the last tokens, and how many there were in a row
        self._packed: bytes | None = None  # of the step, with one token; made when a choice is traced

    def wrote(self, choice: Choice, tokens: int) -> None:
        """The choice has got so many new tokens. Those that come together share the time evenly."""
        since, now = choice.last_at, self._now
        choice.last_at = now
        if (trace := choice.trace) is not None:
            self._trace(trace, tokens)
        if since == self._since and tokens == 1:  # the usual case, fast
            self._times += 1
        elif since is None:
            choice.first_at = now
            self._ttft.add(now - choice.request.arrival)
        else:
            self.close()
            if tokens == 1:
                self._since, self._times = since, 1
            else:
                self._itl.add((now - since) / tokens, tokens)

    def _trace(self, trace: Trace, tokens: int) -> None:
        step = self._step
        if step is None:  # tokens that were sent again come without their steps
            trace.left_out += tokens
        elif len(trace.steps) >= MOST_STEPS:
            trace.left_out += 1
        elif tokens != 1:
            trace.steps.append(self._pack(step, tokens))
        else:
            self._packed = self._packed or self._pack(step, 1)
            trace.steps.append(self._packed)

    def close(self) -> None:
        """Count what is not counted yet."""
        if self._times:
            self._itl.add(self._now - self._since, self._times)
            self._times = 0

    def _pack(self, step: EngineStep, tokens: int) -> bytes:
        start = step.at - step.seconds + self._offset
        span = StepSpan(start, step.seconds, self._iid, tokens, step.batch, step.chunk_tokens, step.passes)
        return pack_step(span)
