"""The simulator against the live system: a short form of tools/parity, with room for a machine that is busy."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from tetri import cost
from tetri.bench import parity
from tetri.bench.deployment import own_folder
from tetri.request import Slo
from tetri.sim.sweep.cases import Case
from tetri.sim.traces import Arrival, TokenCounts, drawn

BUSY = 4.0  # this machine may have other work: so many times the bounds of tools/parity
SLOW = ("emulated.time_scale=4",)  # steps of 106 ms and more, of which what a busy machine adds is a small part
LINK = ("transfer.emulate_gbs=3", "transfer.offer_s=30")  # takes a good part of the time
LENGTHS = TokenCounts.parsed("50-600"), TokenCounts.parsed("2-10")
ADAPTIVE = Case("Mixed", "v100-opt13b", 2, "balanced")


@pytest.fixture
def config():
    with own_folder("parity") as folder:
        yield parity.deployment(folder, [*SLOW, *LINK])


def test_live_and_simulated_agree(config):
    made = parity.measured(config, list(drawn(16, *LENGTHS, 1, 3.0)), 1, lambda text: None)
    assert parity.within(made, BUSY), made
    assert made["ttft_mean"]["live"] > 0.1 and made["jct_mean"]["live"] > 0.5


def test_without_the_link_or_with_another_one_it_would_be_seen(config, tmp_path):
    """What the agreement above is worth."""
    arrivals = list(drawn(16, *LENGTHS, 1, 3.0))
    others = ([], [*LINK, "transfer.emulate_gbs=1.5"])
    setups = (parity.setup_of(parity.deployment(tmp_path, [*SLOW, *other]), 1) for other in others)
    here, *there = (parity.simulate(setup, arrivals) for setup in (parity.setup_of(config, 1), *setups))
    assert [parity.within(parity.compared(here, each), BUSY) for each in there] == [False, False]


def test_the_simulated_deployment_is_the_configured_one(config):
    setup = parity.setup_of(config, 7)
    assert (setup.prefill, setup.decode, setup.mixed, setup.seed) == (2, 2, 0, 7)
    assert setup.cost.decode_s(1, 0) == pytest.approx(4 * 0.0266)
    assert (setup.slots, setup.max_batch, setup.chunk_tokens) == (64, 32, 512)
    assert (setup.auto, setup.slo) == (0, Slo())
    assert len(parity.simulate(setup, [Arrival(0.0, 100, 3), Arrival(0.1, 50, 1)])) == 2


def test_of_a_case_of_the_sweep_the_instances_are_adaptive_and_have_its_limits_and_memory(tmp_path):
    config = parity.deployment(tmp_path, ["cluster.name=other"], replace(ADAPTIVE, instances=4))
    assert [(worker.iid, worker.role) for worker in config.workers] == [(f"a{n}", "auto") for n in range(4)]
    setup, table = parity.setup_of(config, 7), cost.load("v100-opt13b")
    assert (setup.auto, setup.prefill, setup.decode, setup.slo) == (4, 0, 0, ADAPTIVE.slo())
    assert (setup.kv_tokens // 16, setup.chunk_tokens) == (table.kv_tokens // 16, table.chunk_tokens)
    assert setup.cost.decode == table.decode


def test_a_case_that_is_not_there_is_refused():
    done = CliRunner().invoke(parity.main, ["--case", "shift/v100-opt13b/3/balanced"])
    assert done.exit_code == 2 and "no case 'shift/v100-opt13b/3/balanced'" in done.output


def test_a_difference_is_seen():
    true = [(0.1, 1.0, True)] * 99 + [(0.2, 2.0, False)]
    same = parity.compared(true, true)
    assert parity.within(same) and all(made["off"] == 0 for made in same.values())
    later = parity.compared(true, [(ttft, jct * 1.06, kept) for ttft, jct, kept in true])
    assert not parity.within(later) and parity.within(later, 2.0)
    assert later["jct_mean"]["off"] == pytest.approx(0.06) and later["ttft_p99"]["off"] == 0
    missed = parity.compared(true, [(ttft, jct, kept and place > 5) for place, (ttft, jct, kept) in enumerate(true)])
    assert missed["slo_attainment"] == {"live": 0.99, "simulated": 0.93, "off": pytest.approx(0.93 / 0.99 - 1)}
    assert not parity.within(missed) and parity.within(missed, 2.0)
