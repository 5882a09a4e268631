"""What a gateway counts, and that clients cannot make it grow."""

import pytest

from tetri.proc.gateway.counts import MOST_NAMES, OTHERS, Counts


def test_what_is_counted():
    counts = Counts()
    with counts.opened():
        counts.answered(429)
        counts.answered(200)
        counts.answered(200)
        counts.ignored(["user", "store"])
        counts.ignored(["user"])
        now = counts.plain()
    assert now == {"open": 1, "answered": {"200": 2, "429": 1}, "ignored": {"user": 2, "store": 1}}
    assert counts.plain()["open"] == 0


def test_names_that_clients_invent_are_counted_together_in_the_end():
    counts = Counts()
    counts.ignored(f"{n}" for n in range(3 * MOST_NAMES))
    counts.ignored(["0"])
    found = counts.plain()["ignored"]
    assert len(found) == MOST_NAMES + 1 and found["0"] == 2 and found[OTHERS] == 2 * MOST_NAMES


@pytest.mark.parametrize("name", ["x" * 65, "", "\x1b[2J", "\u00fc", "a b", "a\n"])
def test_a_name_that_is_none_is_not_shown(name):
    counts = Counts()
    counts.ignored([name, "cache-control.x"])
    assert counts.plain()["ignored"] == {OTHERS: 1, "cache-control.x": 1}
