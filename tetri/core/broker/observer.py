"""The observer: measures how requests fare and remembers what has happened, for people and their tools. The broker's
other parts tell it; none of them asks it."""

from __future__ import annotations

from tetri.core.broker.history import History
from tetri.core.broker.measures import Buckets, Meters
from tetri.core.broker.requests import Choice
from tetri.wire.clients import Done, Observation, Status


class Observer:
    """Takes note of what happens to choices and instances. Times are in seconds."""

    def __init__(self, epoch: int) -> None:
        """`epoch`: of this start of the broker."""
        self.epoch = epoch
        self.meters, self.history = Meters(), History()

    # ------------------------------------------------------------ choices

    def refused(self, reason: str) -> None:
        """A Submit was refused, for one of the reasons of `requests_refused`."""
        self.meters.count("requests_refused", reason)

    def moved(self, choice: Choice, now: float) -> None:
        """A choice has entered a stage, or has got another holder."""
        holder = None if choice.stage.ended else choice.holder
        self.history.moved(choice.id, choice.stage, holder or "", choice.attempt, len(choice.output), now)

    def placed(self, choices: int, queued_s: float) -> None:
        """So many choices were assigned to an instance with `queued_s` seconds of predicted prefill work."""
        self.meters.histograms["queue_predicted"].add(queued_s, choices)

    def retried(self, reason: str) -> None:
        """Another attempt begins, for one of the reasons of `retries`."""
        self.meters.count("retries", reason)

    def step(self, now: float) -> StepTokens:
        """The tokens of an engine step have come. Call `wrote` for each choice, then `close`."""
        return StepTokens(self.meters.histograms["itl"], now)

    def ended(self, choice: Choice, done: Done, now: float) -> None:
        """A choice has ended."""
        outputs, tpot_s = len(choice.output), None
        if outputs > 1 and choice.first_at is not None and choice.last_at is not None:
            tpot_s = (choice.last_at - choice.first_at) / (outputs - 1)
        self.meters.ended(done, tpot_s)
        self.history.ended(choice.id, done, tpot_s, choice.prefill or "", choice.decode or "", now)

    # ------------------------------------------------------------ instances

    def happened(self, kind: str, iid: str, note: str, now: float) -> None:
        """Something happened to an instance: one of the kinds of ClusterEvent."""
        self.history.happened(kind, iid, note, now)

    def role_changed(self, iid: str, was: str, role: str, took_s: float, now: float) -> None:
        """A change of role was carried out."""
        self.meters.count("role_changes", f"{was}>{role}")
        self.happened("role", iid, f"{was} > {role} in {took_s:.2f} s", now)

    # ------------------------------------------------------------ the answers

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
    """The output tokens of one engine step, as they reach the broker: the time since the token before is the same for
    most of them, so it is counted once. Runs for every token of every request."""

    __slots__ = ("_itl", "_now", "_since", "_times")

    def __init__(self, itl: Buckets, now: float) -> None:
        self._itl, self._now = itl, now
        self._since, self._times = now, 0  # of the last tokens, and how many there were in a row

    def wrote(self, choice: Choice, tokens: int) -> None:
        """The choice has got so many new tokens. Those that come together share the time evenly."""
        since, now = choice.last_at, self._now
        choice.last_at = now
        if since == self._since and tokens == 1:  # the usual case, fast
            self._times += 1
        elif since is None:
            choice.first_at = now
        else:
            self.close()
            if tokens == 1:
                self._since, self._times = since, 1
            else:
                self._itl.add((now - since) / tokens, tokens)

    def close(self) -> None:
        """Count what is not counted yet."""
        if self._times:
            self._itl.add(self._now - self._since, self._times)
            self._times = 0
