"""Readiness of a simulated deployment: a cut path is named while it is cut, traffic or not, and busy is not broken.
Under faults, canaries leave nothing behind and disturb no request."""

from dataclasses import replace
from random import Random

import pytest

from tests.sim.shapes import WildPredictor, cost, some_faults, some_shape
from tests.sim.test_cuts import SLOW
from tetri.core.actions import FromClient
from tetri.faults import parse_cuts
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.traces import Arrival
from tetri.wire.clients import CheckReadiness

PROBE = b"probe"


class Probed(FaultyWorld):
    """Somebody asks for readiness twice a second; `answers` are by time."""

    def _start(self):
        self.answers = {}
        super()._start()
        self._ask(None)

    def _ask(self, _):
        self.send(FromClient(PROBE, CheckReadiness()))
        self.kernel.at(self.kernel.now + 0.5, self._ask)

    def _deliver(self, name, message):
        if name != PROBE:
            return super()._deliver(name, message)
        self.answers[self.kernel.now] = message
        return "sent"

    def unready(self, since, until):
        """The answers in this time that are not "ready"."""
        return [found.why for at, found in self.answers.items() if since <= at < until and not found.ready]


def arrivals(rate, seconds, output=8):
    rng, sampling = Random(1), Sampling(max_tokens=output, ignore_eos=True)
    count = int(rate * seconds)
    return [Arrival(at / rate, rng.randint(1, 50), output, sampling=sampling) for at in range(count)]


def probed(requests, cuts="", faults=None, **setup):
    world = Probed(replace(SLOW, **setup), requests, faults or Faults(until=0.0), cuts=parse_cuts(cuts))
    world.run()
    return world


@pytest.mark.parametrize("rate", [0.2, 1])
def test_a_cut_path_is_named_while_it_is_cut_with_little_traffic_and_with_much(rate):
    world = probed(arrivals(rate, 60), "p0>d1@20-40", prefill=2, decode=2)
    assert not world.unready(5, 20) and not world.unready(45, 60)
    seen = world.unready(36, 40)  # with few requests, the canary of this pair comes every fifteen seconds
    assert len(seen) >= 7 and {why.split(":")[0] for why in seen} == {"p0 to d1 is broken"}
    assert all(outcome.state == "done" for outcome in world.clients.outcomes)


def test_under_overload_nothing_is_broken():
    """Prompts wait for tens of seconds, far longer than a canary may: it waits behind them."""
    world = probed(arrivals(5, 12), prefill=1, decode=2, cost=cost(0.2))
    assert world.clients.last_s > 24 and not world.unready(2, world.clients.last_s)


def test_under_faults_canaries_leave_nothing_behind_and_disturb_no_request():
    """The world checks all promises, those of each core after each event too."""
    tried = 0
    for seed in range(20):
        shape = some_shape(seed)
        world = Probed(shape.setup, shape.choosing(seed), some_faults(seed), predictor=WildPredictor)
        world.run()
        tried += world.broker.core.pair_checks._number
    assert tried > 16
