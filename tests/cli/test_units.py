"""How quantities look in a terminal."""

import pytest

from tetri.cli import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (0.0, "0.0 ms"), (0.0721, "72.1 ms"), (1.0, "1.00 s"), (99.9, "99.90 s")),
        *((100.0, "1 min 40 s"), (3599.0, "59 min 59 s"), (7260.0, "2 h 1 min")),
    ],
)
def test_a_duration_has_the_unit_that_fits(value, text):
    assert units.seconds(value) == text


def test_an_age_is_in_whole_seconds():
    assert [units.ago(value) for value in (-0.1, 0.6, 59.0, 61.0, 7260.0)] == [
        *("0 s", "1 s", "59 s", "1 min 1 s", "2 h 1 min")
    ]


def test_bytes_numbers_and_shares_have_three_digits_at_most():
    assert [units.amount(n) for n in (0, 999, 1000, 2_949_120, 35_389_440_000)] == [
        *("0 B", "999 B", "1 kB", "2.95 MB", "35.4 GB")
    ]
    assert [units.number(n) for n in (None, 0.0, 1.234, 999.0, 12345.6)] == ["-", "0", "1.23", "999", "12,346"]
    assert [units.share(1, 3), units.share(0, 0)] == ["33%", "-"]
    assert [units.count(1, "chunk"), units.count(2048, "token")] == ["1 chunk", "2048 tokens"]


@pytest.mark.parametrize("plain", [False, True])
def test_a_bar_is_as_wide_as_asked_and_shows_even_the_shortest(plain):
    for start, end in ((0.0, 0.0), (0.0, 1.0), (0.25, 0.75), (1.0, 1.0), (0.99, 1.0), (0.5, 0.5001)):
        bar = units.bar(end, 8, start, plain)
        assert len(bar) == 8 and bar.strip()
    assert units.bar(0.75, 8, 0.25, plain) == f"  {'#' * 4 if plain else '█' * 4}  "
    assert plain or units.bar(0.5625, 8) == "████▌   "


def test_a_sparkline_shows_the_largest_of_what_shares_a_column():
    assert units.sparkline([], 10) == ""
    assert units.sparkline([0.0, 4.0, 8.0], 10) == "▁▅█"
    assert units.sparkline([1.0, 8.0, 1.0, 1.0], 2) == "█▂"
    assert units.sparkline([0.0, 0.0], 10, plain=True) == "__"
