"""The request table."""

import pytest

from tetri.core.actions import Broken
from tetri.core.table import Row, Table
from tetri.request import Sampling, Stage


def row(number=1, **changes):
    made = Row(f"r{number}", f"k{number}", b"c", (1, 2), Sampling(max_tokens=4), 0.0, Stage.QUEUED, 0.0)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def table():
    made = Table()
    made.add(row(1, prefill="p1"))
    made.add(row(2, stage=Stage.DECODE, prefill="p1", decode="d1"))
    return made


def test_rows_are_found_by_who_holds_them(table):
    assert [each.rid for each in table.held_by("p1")] == ["r1"]
    assert [each.rid for each in table.held_by("d1")] == ["r2"] and not table.held_by("d2")
    assert table.counts() == {"queued": 1, "decode": 1}


def test_ended_rows_are_no_more_active_until_they_are_forgotten(table):
    table.rows["r1"].stage = Stage.DONE
    table.open -= 1
    table.check()
    assert [each.rid for each in table.active()] == ["r2"] and not table.held_by("p1")
    table.forget("r1")
    assert table.keys == {"k2": "r2"}
    table.check()


def test_a_key_that_leads_elsewhere_stays(table):
    table.keys["k1"] = "r2"
    table.forget("r1")
    assert table.keys["k1"] == "r2"


def test_stages_add_up_and_news_never_lead_back():
    made = row()
    made.advance(Stage.PREFILL, 1.0)
    made.advance(Stage.QUEUED, 2.0)
    made.advance(Stage.MOVING, 3.0)
    made.move(Stage.QUEUED, 4.0)
    made.move(Stage.DONE, 7.0)
    assert made.spent == {Stage.QUEUED: 4.0, Stage.PREFILL: 2.0, Stage.MOVING: 1.0}


@pytest.mark.parametrize(
    "stage, prefill, outstanding",
    [(Stage.QUEUED, "p1", 3), (Stage.PREFILL, "p1", 3), (Stage.MOVING, "p1", 0), (Stage.QUEUED, None, 0)],
)
def test_outstanding_tokens_are_those_still_to_be_prefilled(stage, prefill, outstanding):
    assert row(stage=stage, prefill=prefill, output=[9]).outstanding == outstanding


def test_it_is_full_by_its_last_token_or_its_length():
    assert not row(output=[1, 2, 3]).full
    assert row(output=[1, 2, 3, 4]).full and row(output=[1], last="stop").full


def test_a_receipt_without_an_end_says_what_is_known():
    receipt = row(prefill="p1", attempt=3).receipt()
    assert (receipt.prompt_tokens, receipt.prefill_instance, receipt.attempts) == (2, "p1", 3)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"stage": Stage.DONE}, "2 rows counted as open, 1 are"),
        ({"key": "other"}, "key k1 leads to r1"),
        ({"stage": Stage.DECODE, "decode": None}, "in decode nowhere"),
        ({"stage": Stage.MOVING, "prefill": None}, "in moving nowhere"),
        ({"output": [1] * 5}, "has 5 tokens"),
        ({"asked": 1}, "has 0 tokens, 1 worded"),
        ({"sent": 1}, "sent more than it had"),
    ],
)
def test_check_finds_what_is_wrong(table, changes, complaint):
    for name, value in changes.items():
        setattr(table.rows["r1"], name, value)
    with pytest.raises(Broken, match=complaint):
        table.check()
