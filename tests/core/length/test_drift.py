"""Traffic that changes: how soon the prior, the calibration and the switch follow, in ends.

The logarithm of a length is normal: what an honest predictor knows of it and what nobody knows are drawn apart. Texts
end in the order in which they would in a batch of 32, so the long ones of a new kind end late."""

from heapq import heappop, heappush
from math import exp, log
from random import Random
from statistics import NormalDist, mean

import pytest

from tests.core.build import capacity, identity
from tetri.core.length.estimator import LengthEstimator
from tetri.engine_request import HiddenStateEstimate
from tetri.policy.distribution import quantile
from tetri.policy.rules import Rules
from tetri.request import Expected, LengthDistribution, Sampling

WIDTH, BUCKETS, LIVE = 50, 22, 32
MIDDLE, KNOWN, UNKNOWN = log(200), 0.8, 0.6
UNIT = NormalDist()


def distribution(middle, spread):
    sums = [UNIT.cdf((log(place * WIDTH) - middle) / spread) for place in range(1, BUCKETS)]
    return LengthDistribution(
        WIDTH, tuple(after - before for before, after in zip([0.0, *sums], [*sums, 1.0], strict=True))
    )


def honest(known, rng):
    return distribution(MIDDLE + known, UNKNOWN)


def of_another(known, rng):
    """Odds that are right for some other prompt."""
    return distribution(MIDDLE + rng.gauss(0, KNOWN), UNKNOWN)


def too_sure(known, rng):
    return distribution(MIDDLE + rng.gauss(0, 1), 0.1)


def always_long(known, rng):
    return distribution(MIDDLE + 2, 0.2)


def upside_down(known, rng):
    return distribution(MIDDLE - known, UNKNOWN)


def no_better(known, rng):
    return distribution(MIDDLE, 1.0)


class Traffic:
    """`ends` texts end in each `run`, which says of each whether it ended below the high end of its range.
    `switches`: after how many ends of a run the predictor was switched, and to what."""

    def __init__(self, seed, cover=0.0):
        rules = Rules(length="trained", length_cover=cover)
        expected = Expected("hidden", distribution(MIDDLE, 1.0))
        own = identity("p1", "prefill", rules=rules, expected=expected, capacity=capacity(context=8192))
        self.view, self.rng, self.names, self.now = LengthEstimator(own), Random(seed), 0, 0.0
        self.running, self.inside, self.switches, self.medians = [], [], [], []

    def run(self, ends, says=honest, scale=1.0, most=4096):
        self.inside, self.switches, self.medians = [], [], []
        sampling = Sampling(max_tokens=most)
        while len(self.inside) < ends:
            self.now += 250 * scale / LIVE
            while self.running and self.running[0][0] <= self.now:
                self._end(*heappop(self.running))
            self.names += 1
            known = self.rng.gauss(0, KNOWN)
            length = min(max(int(scale * exp(MIDDLE + known + self.rng.gauss(0, UNKNOWN))), 1), most)
            high = self.view.estimates(
                str(self.names), HiddenStateEstimate("key", 0, says(known, self.rng)), sampling
            ).high
            heappush(self.running, (self.now + length, self.names, length, high, most))
        return self.inside

    def _end(self, at, name, length, high, most):
        before = self.view.prompt.on
        self.view.ended(str(name), length, "length" if length == most else "stop")
        self.inside.append(length < high)
        if self.view.prompt.on != before:
            self.switches.append((len(self.inside), not before))
        if len(self.inside) % 100 == 0:
            self.medians.append(quantile(self.view.prior.curve(0, 0, 4096), 0.5))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_lengths_that_change_by_three(seed):
    """The predictor goes on as if nothing had happened: all its odds are too short now. They still tell long from
    short, so it stays on, and after some hundred ends the cover is there again. So it is when all get short again."""
    traffic = Traffic(seed, cover=0.9)
    traffic.run(800)
    assert traffic.medians[-1] == pytest.approx(200, rel=0.2)
    longer = traffic.run(1000, scale=3.0)
    assert mean(longer[:100]) < 0.7 and mean(longer[400:]) == pytest.approx(0.9, abs=0.05)
    assert traffic.medians[5:] == pytest.approx([600] * 5, rel=0.25)
    assert not traffic.switches
    shorter = traffic.run(1000)
    assert mean(shorter[:100]) > 0.95 and mean(shorter[500:]) == pytest.approx(0.9, abs=0.05)
    assert traffic.medians[5:] == pytest.approx([200] * 5, rel=0.25)
    assert not traffic.switches


@pytest.mark.parametrize("says", [of_another, too_sure, always_long, upside_down])
def test_garbage_is_switched_off_and_who_recovers_is_switched_on(says):
    traffic = Traffic(2)
    traffic.run(800, most=1024)
    status = traffic.view.status()
    assert status.on and not traffic.switches and status.right > 1.1 * status.prior_right
    traffic.run(600, says, most=1024)
    ((ends, on),) = traffic.switches
    assert not on and ends <= 400 and not traffic.view.status().on
    traffic.run(800, most=1024)
    ((ends, on),) = traffic.switches
    assert on and ends <= 500 and traffic.view.status().on


def test_one_as_good_as_the_prior_takes_no_turns():
    traffic = Traffic(104)
    traffic.run(3000, no_better, most=1024)
    assert len(traffic.switches) <= 5
