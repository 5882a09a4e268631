import pytest

from tetri.sim.sweep import quick
from tetri.sim.sweep import store as stores
from tetri.sim.sweep.arrangements import named
from tetri.sim.sweep.cases import Case
from tetri.sim.sweep.results import Attainment, Result, Spread
from tetri.sim.sweep.store import Store, StoreError

CASE = Case("LPLD", "v100-opt13b", 2, "balanced", size=50)
SPREAD = Spread(1.0, 0.9, 2.0, 3.0)
RESULT = Result(2.0, {"balanced": Attainment(0.9, (1.0, 0.9, 0.9, 0.8))}, SPREAD, SPREAD, SPREAD)
CUT = Result(3.0, {"balanced": Attainment(0.1, (0.1,) * 4)}, None, None, None, certain=True)
COUPLED, AUTO = named("coupled-ll-512", 2), named("auto", 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sweep.jsonl"


def test_what_was_added_is_known_to_the_next_store_too(path):
    store = Store(path)
    store.add(CASE, COUPLED, CUT, 1.5)
    store.add(CASE, COUPLED, RESULT, 2.0)
    assert store.known(CASE, COUPLED) == Store(path).known(CASE, COUPLED) == [RESULT, CUT]
    assert Store(path).known(CASE, AUTO) == []


def test_cases_that_differ_in_the_regime_share_the_runs_of_fixed_arrangements(path):
    store, other = Store(path), Case("LPLD", "v100-opt13b", 2, "tight-tpot", size=50)
    store.add(CASE, COUPLED, RESULT, 0.0)
    store.add(CASE, AUTO, RESULT, 0.0)
    assert store.known(other, COUPLED) == [RESULT] and store.known(other, AUTO) == []


def test_other_requests_or_settings_are_not_the_same_run(path, monkeypatch):
    Store(path).add(CASE, COUPLED, RESULT, 0.0)
    assert Store(path).known(Case("LPLD", "v100-opt13b", 2, "balanced", size=51), COUPLED) == []
    monkeypatch.setattr(quick, "SLOTS", 128)
    stores._digest.cache_clear()
    assert Store(path).known(CASE, COUPLED) == []
    stores._digest.cache_clear()


def test_other_sources_of_the_policies_only_concern_auto(path, monkeypatch):
    store = Store(path)
    store.add(CASE, COUPLED, RESULT, 0.0)
    store.add(CASE, AUTO, RESULT, 0.0)
    monkeypatch.setattr(stores, "_sources", lambda: "changed")
    stores._digest.cache_clear()
    assert store.known(CASE, COUPLED) == [RESULT] and store.known(CASE, AUTO) == []
    stores._digest.cache_clear()


def test_a_line_that_was_cut_off_is_left_out_and_any_other_is_an_error(path):
    Store(path).add(CASE, COUPLED, RESULT, 0.0)
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert Store(path).known(CASE, COUPLED) == [RESULT]
    path.write_text("other\n" + whole)
    with pytest.raises(StoreError, match="sweep.jsonl:1: not a result of a sweep"):
        Store(path)
