"""Processes that stop for longer than `dead_s`, in every stage of a request: as in a container that is paused, all of
them lose nobody; a worker alone is lost, and its requests start over. The world checks every token."""

from dataclasses import replace

import pytest

from tests.sim.shapes import ONE, cost
from tetri.core.actions import BROKER
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.traces import Arrival
from tetri.sim.world import MONITOR

# Slow enough for a request to be caught in each stage.
SETUP = replace(ONE, cost=cost(0.02), link_bytes_s=2000.0, kv_paths=(("stream",),))
DEAD_S = SETUP.timeouts.dead_s
FROZEN_S, LATE_S = 3 * DEAD_S, 0.6 * DEAD_S
MOMENTS = [0.02 * moment for moment in range(1, 24)]  # from before the arrival to the last tokens
WORKERS = ("p0", "d0")


def served(moment, goes_on, requests=2):
    """Requests of a deployment in which processes stop at a moment: name -> seconds for which it stops."""
    sampling = Sampling(max_tokens=10, ignore_eos=True)
    arrivals = [Arrival(0.05, 20 + number, 10, None, sampling=sampling) for number in range(requests)]
    world = FaultyWorld(SETUP, arrivals, Faults(until=0.0))
    stages = {}

    def freeze(_):
        stages.update({stage: count for stage, count in world.broker.core.table.counts().items() if count})
        for name, seconds in goes_on.items():
            process = world.wiring.processes[name]
            process.stop()
            world.kernel.at(world.kernel.now + seconds, process.go_on)

    world.kernel.at(moment, freeze)
    world.run()
    counters, ends = world.broker.core.counters, [client.done.reason for client in world.clients.clients]
    return stages, counters["workers_lost"], counters["restarts"], ends


@pytest.mark.parametrize("first", ["broker", "workers"])
def test_when_all_stop_nobody_is_lost_whoever_goes_on_first(first):
    """The others follow later than the broker's grace for its own delays, and before `dead_s`."""
    late = {name: FROZEN_S + LATE_S * ((name == BROKER) == (first == "workers")) for name in (BROKER, *WORKERS)}
    seen = {}
    for moment in MOMENTS:
        stages, *found = served(moment, {**late, MONITOR: FROZEN_S})
        assert found == [0, 0, ["length"] * 2], moment
        seen.update(stages)
    assert {"queued", "prefill", "moving", "decode"} <= seen.keys()


@pytest.mark.parametrize("name", [BROKER, MONITOR])
def test_when_one_that_serves_nobody_stops_nobody_is_lost(name):
    for moment in MOMENTS[::4]:
        assert served(moment, {name: FROZEN_S})[1:] == (0, 0, ["length"] * 2), moment


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_stops_alone_is_lost_and_no_request_is(name):
    found = [served(moment, {name: FROZEN_S}) for moment in MOMENTS[::4]]
    assert all(lost == 1 and reasons == ["length"] * 2 for _, lost, _, reasons in found)
    assert any(restarts for _, _, restarts, _ in found)
