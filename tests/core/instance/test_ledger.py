"""The one owner of an engine's blocks."""

import pytest

from tetri.core.actions import Broken
from tetri.core.instance.ledger import Ledger


@pytest.fixture
def ledger():
    made = Ledger(10, 0.5)
    yield made
    made.audit()


def test_accounts_are_taken_grown_and_closed(ledger):
    assert ledger.allocate("a", 4) and ledger.free == 6 and "a" in ledger and len(ledger) == 1
    ledger.grow("a", 5)
    ledger.grow("a", 2)  # an engine does not give blocks of a running leg back
    assert ledger.free == 5
    ledger.close("a")
    ledger.close("a")
    assert ledger.free == 10 and "a" not in ledger


def test_there_is_no_room_beyond_the_capacity(ledger):
    assert ledger.allocate("a", 10) and not ledger.allocate("b", 1) and len(ledger) == 1
    assert not ledger.reserve(["b"], 1) and "b" not in ledger and ledger.grantable() == 0


def test_an_account_opened_twice_must_not_go_on(ledger):
    ledger.allocate("a", 1)
    with pytest.raises(Broken, match="opened twice"):
        ledger.allocate("a", 1)


def test_what_running_ones_will_take_is_kept_free(ledger):
    ledger.allocate("a", 4)
    assert not ledger.reserve(["b"], 3, kept=4) and "b" not in ledger and ledger.free == 6
    assert ledger.reserve(["b"], 2, kept=4) and ledger.free == 4


@pytest.mark.parametrize(
    "reserved, running, kept, most",
    [
        (0, 0, 0, 10),
        (0, 0, 3, 7),
        (0, 12, 0, 0),  # overdrawn
        (2, 0, 0, 3),  # half of all may be reserved
        (2, 6, 0, 2),
        (2, 6, 2, 0),
        (2, 6, 9, 0),
        (7, 0, 0, 0),  # a single one may be larger
    ],
)
def test_the_largest_reservation_that_can_be_made(ledger, reserved, running, kept, most):
    if reserved:
        assert ledger.reserve(["reserved"], reserved)
    assert ledger.allocate("running", min(running, 1))
    ledger.grow("running", running)
    assert ledger.grantable(kept) == most
    assert not ledger.reserve(["a"], most + 1, kept)
    assert ledger.crowded(most + 1) == (reserved > 0 and reserved + most + 1 > 5)
    if most:
        assert ledger.reserve(["a"], most, kept)


def test_the_engine_may_hold_less_but_never_more(ledger):
    ledger.allocate("a", 3)
    ledger.check([("a", 2)])
    with pytest.raises(Broken, match="the engine holds 4 blocks for a, the ledger 3"):
        ledger.check([("a", 4)])
    with pytest.raises(Broken, match="for b, the ledger 0"):
        ledger.check([("b", 1)])


def test_what_was_counted_wrong_is_found():
    ledger = Ledger(10, 0.5)
    ledger.reserve(["a"], 1)
    ledger.free -= 1
    with pytest.raises(Broken, match="8 blocks free and 1 reserved, counted 9 and 1"):
        ledger.audit()


def test_the_account_of_a_prefill_that_stays_becomes_a_reservation_of_any_size(ledger):
    assert ledger.reserve(["x"], 4) and ledger.allocate("p", 3)
    ledger.hand_on("p", "d")
    assert "p" not in ledger and "d" in ledger and (ledger.free, ledger.reserved) == (3, 7)
    assert ledger.grantable() == 0 and ledger.crowded(1)
    ledger.run("d")
    assert (ledger.free, ledger.reserved) == (3, 4)
    ledger.grow("d", 4)
    ledger.close("p")
    ledger.close("d")
    assert ledger.free == 6
