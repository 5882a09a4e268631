"""The request table."""

import pytest

from tetri.core.actions import Broken
from tetri.core.broker.requests import Row, Table
from tetri.request import Receipt, Sampling, Stage


def row(number=1, **changes):
    made = Row(f"r{number}", f"k{number}", b"c", (1, 2), Sampling(max_tokens=4), 0.0, Stage.QUEUED, 0.0)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def table():
    """r1 is to be computed by p1, r2 is decoded by d1."""
    made = Table()
    for number in (1, 2):
        made.add(row(number))
        made.assign(made.rows[f"r{number}"], "p1", 5)
    made.hand_over(made.rows["r2"], "d1")
    made.move(made.rows["r2"], Stage.DECODE, 0.0)
    yield made


def test_every_way_of_a_row_is_followed(table):
    first, second = table.rows["r1"], table.rows["r2"]
    assert table.work_ns == {"p1": 5} and not table.unplaced
    table.assign(second, "p1", 7)  # it counts only from its next attempt on
    assert table.work_ns == {"p1": 5}
    table.start_over(second, 1.0)
    assert (second.attempt, second.prefill, second.decode) == (2, None, None)
    assert list(table.unplaced) == ["r2"] and not table.held_by("d1")
    table.check()
    table.assign(second, "p1", 7)
    assert table.work_ns == {"p1": 12}
    table.assign(second, "p2", 9)
    assert table.work_ns == {"p1": 5, "p2": 9}
    table.assign(second, "p1", 7)
    assert table.work_ns == {"p1": 12} and not table.unplaced and list(table.held_by("p1")) == ["r1", "r2"]
    table.advance(first, Stage.PREFILL, 2.0)
    assert table.work_ns == {"p1": 12}
    table.advance(first, Stage.MOVING, 3.0)
    assert table.work_ns == {"p1": 7} and table.counts() == {"queued": 1, "moving": 1}
    table.check()
    for each in (first, second):
        table.move(each, Stage.DONE, 4.0)
    assert not table.work_ns and not table.held_by("p1") and not table.counts() and not table.open
    table.check()


def test_a_receipt_without_an_end_says_what_is_known_and_that_the_rest_is_not():
    receipt = row(prefill="p1", attempt=3).receipt()
    assert receipt == Receipt(prompt_tokens=2, prefill_instance="p1", attempts=3)
    unknown = ("adopted", "recomputed", "kv_bytes", "chunks", "transport", "preempted", "refetched")
    assert [getattr(receipt, name) for name in unknown] == [None] * 7


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"stage": Stage.DONE}, "the index has 2 open rows, a scan finds 1"),
        ({"key": "other"}, "key k1 leads to r1"),
        ({"stage": Stage.PREFILL}, "the table's rows by stage are out of date"),
        ({"prefill": "p2"}, "the table's rows by instance are out of date"),
        ({"work_ns": 6}, "the table's prefill work by instance are out of date"),
        ({"output": [1] * 5}, "has 5 tokens"),
        ({"asked": 1}, "has 0 tokens, 1 sent to the detokenizer"),
        ({"sent": 1}, "has sent more messages than its outbox holds"),
    ],
)
def test_check_finds_what_is_wrong(table, changes, complaint):
    for name, value in changes.items():
        setattr(table.rows["r1"], name, value)
    with pytest.raises(Broken, match=complaint):
        table.check()


def test_check_finds_a_row_that_waits_and_is_not_listed(table):
    table.add(row(3))
    table.unplaced.clear()
    with pytest.raises(Broken, match="rows without a place are out of date"):
        table.check()


@pytest.mark.parametrize("stage", [Stage.DECODE, Stage.MOVING])
def test_check_finds_a_row_that_is_nowhere(table, stage):
    table.add(row(3))
    table.move(table.rows["r3"], stage, 1.0)
    with pytest.raises(Broken, match=f"in stage {stage} without an instance"):
        table.check()
