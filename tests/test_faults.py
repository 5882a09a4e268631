"""transfer.faults: what may be asked for, and dice that fall the same way for the same seed."""

from __future__ import annotations

import pytest

from tetri.faults import KINDS, Chance, Cut, Faults, FaultsError, parse_cuts, parse_faults

ALL = (
    "drop=0.01,delay=0.02,duplicate=0.01,reorder=0.01,flip=0.01,truncate=0.01,replay=0.005,die=0.0005,"
    "lose=0.01,late=0.02,spoil=0.001,longest=0.1,seed=1"
)


def test_nothing_asked_for_is_nothing() -> None:
    assert parse_faults("") is None and parse_faults("  ") is None


def test_every_fault_has_its_chance() -> None:
    faults = parse_faults(f" {ALL.replace(',', ' , ')} ")
    assert faults == parse_faults(ALL)
    assert faults is not None and all(getattr(faults, kind) > 0 for kind in KINDS)
    assert (faults.drop, faults.die, faults.longest, faults.seed) == (0.01, 0.0005, 0.1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drop", "drop needs a number, as in"),
        ("dorp=0.1", "'dorp=0.1' is no fault"),
        ("drop=0.1,", "'' is no fault"),
        ("drop=x", "drop must be a plain number, got 'x'"),
        ("drop=-0.1", "plain number"),
        ("drop=nan", "plain number"),
        ("drop=1e-3", "plain number"),
        ("drop=", "plain number, got ''"),
        ("drop=1.5", "from 0 to 1, got 1.5"),
        ("drop=0.1,drop=0.2", "drop is given twice"),
        ("drop=0.1,seed=1.5", "seed must be a whole number"),
        ("drop=0.1,longest=61", "at most 60 seconds"),
        ("seed=3", "nothing would go wrong"),
        ("drop=0", "nothing would go wrong"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, says: str) -> None:
    with pytest.raises(FaultsError) as error:
        parse_faults(text)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("", []),
        ("d1", [Cut("d1")]),
        (" p0>d1 , flip:d0@file", [Cut("d1", "p0"), Cut("d0", flips=True, by_file=True)]),
        ("flip:p0>d1@5-20.5", [Cut("d1", "p0", flips=True, start=5.0, stop=20.5)]),
    ],
)
def test_cuts_name_a_reader_perhaps_a_sender_and_a_time(text: str, cuts: list[Cut]) -> None:
    assert parse_cuts(text) == tuple(cuts)


@pytest.mark.parametrize("text", ["p0>", ">d1", "d1@5", "d1@5-5", "d1@x-y", "lose:d1", "d1 d2", "d1@file-5"])
def test_what_is_no_cut_is_said_in_one_line(text: str) -> None:
    with pytest.raises(FaultsError, match=r"write READER or SENDER>READER") as error:
        parse_cuts(text)
    assert "\n" not in str(error.value)


def test_a_cut_applies_to_its_reader_sender_and_time() -> None:
    cut = Cut("d1", "p0", start=5.0, stop=20.0)
    assert [cut.applies("d1", "p0", now) for now in (4.9, 5.0, 19.9, 20.0)] == [False, True, True, False]
    assert not cut.applies("d0", "p0", 6.0) and not cut.applies("d1", "p1", 6.0)
    assert [Cut("d1", by_file=True).applies("d1", "p9", 6.0, file) for file in (False, True)] == [False, True]


def falls(chance: Chance) -> list[bool]:
    return [chance.happens(kind) for _ in range(50) for kind in KINDS]


def test_the_same_seed_and_name_is_the_same_chance() -> None:
    faults = Faults(**dict.fromkeys(KINDS, 0.5), seed=7)
    first = falls(Chance(faults, "d0"))
    assert first == falls(Chance(faults, "d0")) != falls(Chance(faults, "d1"))
    assert True in first and False in first


def test_what_happens_is_counted_and_what_cannot_happen_is_not() -> None:
    chance = Chance(Faults(drop=1.0, flip=0.5), "d0")
    assert chance.counters() == {"injected_drop": 0, "injected_flip": 0}
    flips = sum(chance.happens("flip") for _ in range(100))
    assert not any(chance.happens("die") for _ in range(1000))
    assert all(chance.happens("drop") for _ in range(10))
    assert 0 < flips < 100 and chance.counters() == {"injected_drop": 10, "injected_flip": flips}
    assert all(0 <= chance.seconds() <= chance.faults.longest for _ in range(100))
