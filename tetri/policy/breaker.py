"""A circuit breaker for KV transfers: which instances get no KV for now, because they could not read it.

A decode instance that cannot read KV holds no requests, so it looks empty and every policy would choose it. So after a
failed transfer a prefill instance offers it nothing for a while. Then one offer, the probe, tries it again: if all KV
of the probe lands, the instance is as any other; if the probe fails too, the next pause is twice as long.

The unit is the pair of instances, since a path may be cut for one pair alone. But an instance that can read nobody's
KV says so in its load report (`Load.unread`). That warns prefill instances that have not tried it, and each failed
probe of one delays the probes of all: otherwise each of 64 prefill instances would send probes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

FIRST_S = 0.2  # the first pause; doubles with each failed probe
SPREAD = 2.0  # a pause is up to so many times as long, by chance: the probes of many instances are not sent at once


@dataclass(slots=True)
class Failing:
    """An instance whose last transfer failed. Times are in seconds.

    since     when the first one failed
    until     no transfer before
    why       what happened to the last one
    pauses    how many pauses there were in a row
    own       whether a transfer from here failed, and not only others'
    warned    failed transfers in a row, as the instance itself reports; 0: it can read other instances
    probe     number of the offer that tries it again, None while there is none
    """

    since: float
    until: float
    why: str
    pauses: int = 0
    own: bool = False
    warned: int = 0
    probe: int | None = None


class Breaker:
    """The instances to which transfers from here fail, by id. `longest_s`: the longest pause, apart from SPREAD."""

    def __init__(self, rng: Random, longest_s: float) -> None:
        self.rng, self.longest_s = rng, longest_s
        self.failing: dict[str, Failing] = {}

    def allowed(self, iid: str, now: float) -> bool:
        """Return whether to offer an instance anything now, be it a probe."""
        found = self.failing.get(iid)
        return found is None or (found.probe is None and now >= found.until)

    def blocked(self, now: float) -> list[str]:
        """Return the instances that are not allowed now."""
        return [iid for iid in self.failing if not self.allowed(iid, now)]

    def probe(self, iid: str, number: int) -> None:
        """Record the number of the offer that tries a failing instance again. It was allowed."""
        self.failing[iid].probe = number

    def ended(self, iid: str, number: int) -> None:
        """Record that an offer to a failing instance has ended. If it was the probe, another may follow."""
        if self.failing[iid].probe == number:
            self.failing[iid].probe = None

    def failed(self, iid: str, number: int, why: str, now: float) -> None:
        """Record that an instance could not read the KV of an offer. Only a probe prolongs the pause: offers that were
        made before the first failure fail in numbers."""
        found = self.failing.get(iid)
        if found is None:
            found = self.failing[iid] = Failing(now, now, why)
            self._pause(found, now)
        elif found.probe == number:
            self._pause(found, now)
        found.own, found.why = True, why

    def succeeded(self, iid: str) -> None:
        """Record that all KV of an offer has landed, or that the instance is not the one whose fault a failure was."""
        self.failing.pop(iid, None)

    def warn(self, unread: Mapping[str, int], now: float) -> None:
        """Apply new load reports. `unread`: failed transfers in a row, of the instances that report any."""
        for iid, count in unread.items():
            found = self.failing.get(iid)
            if found is None:
                found = self.failing[iid] = Failing(now, now, "its reads of other instances' KV fail too")
            if count > found.warned:  # somebody's probe has failed
                self._pause(found, now)
            found.warned = count
        for iid in [iid for iid, each in self.failing.items() if each.warned and iid not in unread]:
            self.failing[iid].warned = 0
            if not self.failing[iid].own:
                del self.failing[iid]

    def _pause(self, failing: Failing, now: float) -> None:
        seconds = FIRST_S * 2.0**failing.pauses
        if seconds < self.longest_s:
            failing.pauses += 1
        failing.probe, failing.until = None, now + min(seconds, self.longest_s) * self.rng.uniform(1.0, SPREAD)
