"""Find the goodput: the highest rate at which a share of GOAL of the requests keep both limits.

The search reads only known points of (rate, share) and says which rate to try next, so that a sweep that was
interrupted goes on where it was. Rates are rungs of a ladder: arrangements are compared at the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log, sqrt

GOAL = 0.9
LEAST = 0.8  # a run that is certain to attain less may stop
RUNG = 1.005  # the ratio of two rates that follow each other
CLOSE = 0.012  # a share that is so close to the goal is within the noise of a run: the rest is interpolated
NEAR = 1.04  # two rates that are so close to each other are interpolated
FAR = 1.5  # the most that a rate changes from one run to the next
BEYOND = 1.2  # a little farther than it seems, so that the goal comes between two rates


@dataclass(frozen=True, slots=True)
class Point:
    """One run. `share`: of the requests that keep both limits; None: certainly less than LEAST."""

    rate: float
    share: float | None

    @property
    def passes(self) -> bool:
        """Whether it reaches the goal."""
        return self.share is not None and self.share >= GOAL


def on_ladder(rate: float) -> float:
    """The nearest rung."""
    return exp(round(log(rate) / log(RUNG)) * log(RUNG))


def slope(instances: int) -> float:
    """By how much the share falls with the logarithm of the rate, where nothing is known: load fluctuates the less, the
    more instances there are."""
    return sqrt(instances / 2)


def next_rate(points: Sequence[Point], start: float, slope: float) -> float | None:
    """The rate to try next; None if the goodput is known. `start`: the first one."""
    low, high = _bracket(points)
    if _known(low, high):
        return None
    if low is not None and high is not None:
        part = min(max(_part(low, high, slope), 0.25), 0.75)  # where both are far off, the share is no straight line
        rate = low.rate * exp(part * log(high.rate / low.rate))
    elif (one := low or high) is not None:
        rate = _beyond(one, len(points), slope)
    else:
        rate = start
    rate = on_ladder(rate)
    return None if rate in [point.rate for point in points] else rate


def goodput(points: Sequence[Point], slope: float) -> float:
    """The goodput, between the rates of the two points next to it; 0 without a point."""
    low, high = _bracket(points)
    if low is not None and high is not None and high.share is not None:
        return low.rate * exp(_part(low, high, slope) * log(high.rate / low.rate))
    near = low or high
    if near is None:
        return 0.0
    off = 0.0 if near.share is None else near.share - GOAL
    return near.rate * exp(max(min(off, CLOSE), -CLOSE) / slope)


def _bracket(points: Sequence[Point]) -> tuple[Point | None, Point | None]:
    """The highest rate below which all reach the goal, and the lowest that does not."""
    high = min((point for point in points if not point.passes), key=lambda point: point.rate, default=None)
    most = inf if high is None else high.rate
    low = max((each for each in points if each.passes and each.rate < most), key=lambda each: each.rate, default=None)
    return low, high


def _known(low: Point | None, high: Point | None) -> bool:
    if any(point is not None and point.share is not None and abs(point.share - GOAL) <= CLOSE for point in (low, high)):
        return True
    return low is not None and high is not None and high.rate <= low.rate * NEAR


def _beyond(point: Point, tries: int, slope: float) -> float:
    """Where the goal may be, if so many points are all on one side of it."""
    step = -log(FAR) / 2 if point.share is None else BEYOND * (point.share - GOAL) / slope
    return point.rate * exp(max(min(tries * step, log(FAR)), -log(FAR)))


def _part(low: Point, high: Point, slope: float) -> float:
    """Where the share between two points is the goal, 0 to 1."""
    if low.share is None:
        return 0.5
    if high.share is None:
        return BEYOND * (low.share - GOAL) / slope / log(high.rate / low.rate)
    return (low.share - GOAL) / max(low.share - high.share, 1e-9)
