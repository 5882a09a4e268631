"""The request table."""

from array import array

import pytest

from tetri.core.actions import Broken
from tetri.core.broker.requests import Choice, Request, Table
from tetri.request import Sampling, Stage


def request(number=1, n=1, deadline=None, **sampling):
    asked = (f"r{number}", f"k{number}", b"c", array("I", [1, 2]), 0.0, deadline)
    made = Request(*asked, secret="s" * 22, content=b"x")
    made.choices = [Choice(made, index, Sampling(max_tokens=4, **sampling).for_choice(index)) for index in range(n)]
    return made


@pytest.fixture
def table():
    """r1 is to be computed by p1, r2 is decoded by d1."""
    made = Table(lambda choice, now: None, lambda iid: None)
    for number in (1, 2):
        made.add(request(number), 0.0)
        made.assign(made.choices[f"r{number}"], "p1", 5, 0.0)
    made.hand_over(made.choices["r2"], "d1")
    made.move(made.choices["r2"], Stage.DECODE, 0.0)
    yield made


@pytest.mark.parametrize("secret", ["", "s" * 21, "s" * 23, "S" * 22, "é" * 22])
def test_who_does_not_show_its_secret_owns_nothing(table, secret):
    assert table.requests["r1"].owned_by("s" * 22) and not table.requests["r1"].owned_by(secret)


def test_a_key_that_leads_elsewhere_stays(table):
    table.keys["k1"] = "r2"
    table.forget("r1")
    assert table.keys["k1"] == "r2"


def test_what_is_left_until_its_deadline():
    assert [request(deadline=due).left(now) for due, now in ((None, 1.0), (3.0, 1.0), (3.0, 4.0))] == [None, 2.0, 0.0]


def test_work_follows_a_choice_that_is_assigned_again(table):
    table.start_over(table.choices["r2"], 1.0)
    for iid, work_ns, counted in (("p1", 7, {"p1": 12}), ("p2", 9, {"p1": 5, "p2": 9}), ("p1", 7, {"p1": 12})):
        table.assign(table.choices["r2"], iid, work_ns, 0.0)
        assert table.work_ns == counted
    table.check()


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"stage": Stage.DONE}, "the index has 2 open choices, a scan finds 1"),
        ({"id": "other"}, "the table's choices are not those of its requests"),
        ({"stage": Stage.PREFILL}, "the table's choices by stage are out of date"),
        ({"prefill": "p2"}, "the table's choices by instance are out of date"),
        ({"work_ns": 6}, "the table's prefill work by instance are out of date"),
        ({"output": [1] * 5}, "has 5 tokens"),
        ({"asked": 1}, "has 0 tokens, 1 sent to the detokenizer"),
    ],
)
def test_check_finds_what_is_wrong_with_a_choice(table, changes, complaint):
    for name, value in changes.items():
        setattr(table.choices["r1"], name, value)
    with pytest.raises(Broken, match=complaint):
        table.check()


@pytest.mark.parametrize(
    "changes, complaint",
    [({"key": "other"}, "key k1 leads to r1"), ({"weight": 1}, "the account of memory is out of date")],
)
def test_check_finds_what_is_wrong_with_a_request(table, changes, complaint):
    for name, value in changes.items():
        setattr(table.requests["r1"], name, value)
    with pytest.raises(Broken, match=complaint):
        table.check()


def test_check_finds_an_outbox_that_has_sent_too_much_or_holds_more_than_the_output(table):
    table.choices["r1"].outbox.sent = 1
    with pytest.raises(Broken, match="has sent more messages than its outbox holds"):
        table.check()
    table.choices["r1"].outbox.add(0, [7], "h")
    with pytest.raises(Broken, match="or holds more than its output"):
        table.check()


def test_check_finds_a_choice_that_waits_and_is_not_listed(table):
    table.add(request(3), 0.0)
    table.unplaced.clear()
    with pytest.raises(Broken, match="choices without a place are out of date"):
        table.check()


@pytest.mark.parametrize("stage", [Stage.DECODE, Stage.MOVING])
def test_check_finds_a_choice_that_is_nowhere(table, stage):
    table.add(request(3), 0.0)
    table.move(table.choices["r3"], stage, 1.0)
    with pytest.raises(Broken, match=f"in stage {stage} without an instance"):
        table.check()
