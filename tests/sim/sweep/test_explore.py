"""Which arrangements are tried, and which are ruled out. The runs are replaced by arrangements of known goodputs."""

import pytest

from tetri.sim.sweep import explore
from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.explore import Explorer, best
from tetri.sim.sweep.results import Attainment, Result, Spread
from tetri.sim.sweep.store import Store

CASE = Case("HPLD", "v100-opt13b", 4, "balanced", size=40)
SPREAD = Spread(1.0, 1.0, 1.0, 1.0)


@pytest.fixture
def explored(tmp_path, monkeypatch):
    """Returns a function that explores CASE with these goodputs, and returns what was run."""

    def explored(goodputs, case=CASE):
        ran = []

        def evaluate(case, arrangement, rate, least):
            ran.append(arrangement.name)
            reached = goodputs.get(arrangement.name, goodputs.get(arrangement.kind, 0.0)) * case.bound
            share = min(max(0.9 + 3 * (1 - rate / reached), 0.0), 1.0) if reached else 0.0
            attained = Attainment(share, (share,) * 4)
            certain = share < least
            return Result(rate, {case.regime: attained}, *[None if certain else SPREAD] * 3, certain)

        monkeypatch.setattr(explore, "evaluate", evaluate)
        return Explorer(case, Store(tmp_path / f"{case.workload}.jsonl")), ran

    return explored


def test_the_best_coupled_arrangement_is_found_and_hopeless_splits_are_not_run(explored):
    explorer, ran = explored({"coupled-ll": 0.5, "coupled-rr": 0.4, "coupled-ll-256": 0.6, "tandem": 0.3, "split": 0.3})
    standings = explorer.fixed()
    assert best(standings).arrangement == "coupled-ll-256"
    assert best(standings).goodput == pytest.approx(0.6 * CASE.bound, rel=0.02)
    assert not [name for name in ran if name.startswith("split")]
    out = {each.arrangement: each.why for each in standings if each.goodput is None}
    assert "fails at" in out["coupled-rr-512"]
    assert {"its fluid bound is", "its estimate fails at"} == {
        " ".join(why.removeprefix("not the best: ").split()[:-1])
        for name, why in out.items()
        if name.startswith("split")
    }
    assert len(standings) == 3 * (2 + 3)


def test_a_split_that_may_be_better_is_run_with_the_live_cores(explored):
    goodputs = {"coupled-ll": 0.3, "coupled-rr": 0.3, "tandem-2+2-512": 0.5, "split-2+2-512": 0.48, "tandem": 0.2}
    explorer, ran = explored(goodputs)
    rival = best(explorer.fixed())
    assert rival.arrangement == "split-2+2-512" and rival.goodput == pytest.approx(0.48 * CASE.bound, rel=0.02)
    assert {name for name in ran if name.startswith("split")} == {"split-2+2-512"}
    assert rival.near is not None and rival.near.rate == pytest.approx(rival.goodput, rel=0.05)


def test_what_is_known_is_not_run_again(explored):
    explorer, ran = explored({"coupled-ll": 0.5, "coupled-rr": 0.4, "tandem": 0.3})
    first, runs = explorer.fixed(), len(ran)
    assert explorer.fixed() == first and len(ran) == runs


def test_of_a_load_that_shifts_the_best_split_is_found_although_coupled_is_better(explored):
    case = Case("shift", "v100-opt13b", 4, "balanced", size=40)
    goodputs = {"coupled-ll": 0.6, "coupled-rr": 0.4, "tandem": 0.05, "tandem-1+3-512": 0.3, "split-1+3-512": 0.3}
    standings = explored(goodputs, case)[0].fixed()
    assert best(standings).arrangement.startswith("coupled-ll")
    assert best(standings, "split").arrangement == "split-1+3-512"


def test_auto_is_sought_where_it_may_be(explored):
    explorer, ran = explored({"auto": 0.7})
    assert explorer.automatic(0.7 * CASE.bound).goodput == pytest.approx(0.7 * CASE.bound, rel=0.02)
    assert ran == ["auto"]


def test_auto_also_runs_at_the_rate_of_its_rival(explored):
    explorer, ran = explored({"auto": 0.7, "coupled-ll": 0.5, "coupled-rr": 0.4, "tandem": 0.3})
    rival = best(explorer.fixed()).near
    found = explorer.automatic(0.7 * CASE.bound, rival)
    assert found.beside.rate == rival.rate and found.near.rate > 1.3 * rival.rate
    runs = len(ran)
    assert explorer.automatic(0.7 * CASE.bound, rival) == found and len(ran) == runs
