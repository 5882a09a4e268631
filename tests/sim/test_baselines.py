"""The coupled baselines on the same requests as a World."""

from dataclasses import replace

import pytest

from tetri.cost import Cost
from tetri.request import Slo
from tetri.sim.baselines import SYSTEMS, serve
from tetri.sim.setup import Setup, SimError
from tetri.sim.traces import Arrival
from tetri.sim.world import World

COST = Cost(prefill=((1.0, 0.1),), decode=((1.0, 0.02), (2.0, 0.02)))
SETUP = Setup(COST, kv_tokens=8000, chunk_tokens=512)


def test_an_instance_in_any_role_is_a_replica():
    result = serve("coupled", replace(SETUP, mixed=1, auto=2), [Arrival(0.0, 100, 5)])
    assert [*result.instances] == ["c0", "c1", "c2", "c3", "c4"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_instance_is_a_replica(system):
    result = serve(system, SETUP, [Arrival(0.0, 100, 5), Arrival(0.0, 200, 1)])
    first, second = result.outcomes
    assert (first.prefill, second.prefill) == ("c0", "c1") and [*result.instances] == ["c0", "c1"]
    assert second.tpot_s is None and second.jct_s == second.ttft_s == first.ttft_s
    assert first.jct_s == pytest.approx(first.ttft_s + 4 * 0.02)
    assert first.tpot_s == pytest.approx(0.02)
    assert result.end_s == first.jct_s
    assert result.counters == {"preempted": 0, "refused": 0, "steps": 6, "prefill_tokens": 300, "decode_tokens": 4}
    assert result.instances["c0"].busy_s == {"mixed": pytest.approx(first.jct_s)}


@pytest.mark.parametrize("slo", [Slo(), Slo(ttft_s=0.05), Slo(tpot_s=0.01)])
def test_its_requests_have_the_limits_that_a_broker_finds(slo):
    setup, arrivals = replace(SETUP, slo=slo), [Arrival(at, prompt, 5) for at, prompt in ((0.0, 50), (1.0, 2000))]
    theirs, ours = serve("coupled", setup, arrivals).outcomes, World(setup, arrivals).run().outcomes
    assert [each.slo for each in theirs] == [each.slo for each in ours]
    assert {each.slo_result for each in theirs} == {"met" if slo == Slo() else "ttft" if slo.ttft_s else "tpot"}


def test_what_fits_nowhere_is_refused():
    result = serve("coupled", SETUP, [Arrival(0.0, 8000, 5), Arrival(0.0, 10, 5)])
    assert [each.state for each in result.outcomes] == ["refused", "done"]
    assert result.outcomes[0].why == "8005 tokens are more than the context of 8000"


@pytest.mark.parametrize(
    ("arrivals", "says"),
    [([], "there are no requests"), ([Arrival(1.0, 5, 5), Arrival(0.0, 5, 5)], "before its predecessor")],
)
def test_wrong_requests_are_one_line(arrivals, says):
    with pytest.raises(SimError, match=says):
        serve("coupled", SETUP, arrivals)
