import pytest

from tetri.bench.compare.load import Answer
from tetri.bench.compare.plan import Run
from tetri.bench.compare.store import Capacity, Record, Store, Table
from tetri.bench.report import BenchError
from tetri.cost import Cost

SETTINGS = {"model": "m", "requests": 2}
RUN = Run("tetri-auto", "Mixed", "70%", "balanced", 1)
RECORD = Record(RUN, 1.5, [Answer(0.1, 0.2, 0.3, 4, 5, 0.06, 1), Answer(1, 2, 3, 4, 5, error="cut")], 60, 0.1)
COST = Cost(prefill=((1.0, 0.01), (512.0, 0.4)), decode=((1.0, 0.02),), kv_token_bytes=8)
TABLES = [Table("tetri", COST, 0.004), Table("tetri", COST)]


@pytest.fixture
def filled(tmp_path):
    store = Store(tmp_path / "runs.jsonl", SETTINGS)
    store.read()
    for row in (Capacity("Mixed", 2.5), *TABLES, RECORD):
        store.add(row)
    return store


def again(store, settings=SETTINGS):
    made = Store(store.path, settings)
    made.read()
    return made


def test_what_was_added_is_read_again(filled):
    found = again(filled)
    assert found.capacities == filled.capacities == {"Mixed": 2.5}
    assert found.tables == filled.tables == {"tetri": TABLES}
    assert found.records == filled.records == {RUN: RECORD}
    assert found.records[RUN].served == RECORD.answers[:1]


def test_a_line_that_was_cut_off_does_not_count(filled):
    whole = filled.path.read_bytes()
    filled.path.write_bytes(whole[:-10])
    found = again(filled)
    assert found.records == {} and found.capacities == {"Mixed": 2.5}
    found.add(RECORD)
    assert filled.path.read_bytes() == whole and again(filled).records == {RUN: RECORD}


def test_other_settings_are_refused(filled):
    with pytest.raises(BenchError, match="was made with requests 2, not 3: choose another file"):
        again(filled, {**SETTINGS, "requests": 3})


@pytest.mark.parametrize("line", ["nonsense", '{"type": "other"}', '{"type": "run"}'])
def test_another_file_is_refused(filled, line):
    filled.path.write_text(f"{filled.path.read_text()}{line}\n")
    with pytest.raises(BenchError, match=r"runs\.jsonl:6: not a line of a comparison"):
        again(filled)
