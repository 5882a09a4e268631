from math import inf

import pytest

from tetri.net.loop import run


class FakeCore:
    """Acts out loud: every call becomes an action."""

    def __init__(self, deadlines):
        self._deadlines = iter(deadlines)

    def handle(self, event, now):
        return [("handled", event, now)]

    def tick(self, now):
        return [("ticked", now)]

    def deadline(self):
        return next(self._deadlines)


class FakeTime:
    """Time passes only while polling, by exactly what was asked for or up to the next event."""

    def __init__(self, rounds):
        self.time = 100.0
        self.listened = []
        self.waits = []
        self._rounds = list(rounds)

    def poll(self, timeout):
        self.waits.append(timeout)
        passed, events = self._rounds.pop(0)
        self.time += passed if timeout is None else min(passed, timeout)
        return events

    def now(self):
        return self.time

    def listen(self, seconds):
        self.listened.append(seconds)

    def running(self):
        return bool(self._rounds)


def logged(core, fake):
    log = []
    run(core, fake.poll, log.extend, fake, fake.running)
    return log


def test_waits_until_the_deadline_and_ticks_after_every_poll():
    fake = FakeTime([(9, []), (2, ["a", "b"]), (3, [])])
    log = logged(FakeCore([101.5, None, 110.0]), fake)
    assert fake.waits == [1.5, None, 6.5] and fake.listened == [1.5, inf, 6.5]
    handled = [("handled", event, 103.5) for event in "ab"]
    assert log == [("ticked", 101.5), *handled, ("ticked", 103.5), ("ticked", 106.5)]


def test_a_deadline_that_has_passed_polls_without_waiting_and_a_flood_does_not_hold_it_up():
    fake = FakeTime([(5, ["a"])] * 4)
    assert logged(FakeCore([0, -1.0, 99.9, 100.0]), fake)[-1] == ("ticked", 100.0)
    assert fake.waits == [0.0] * 4
    fake = FakeTime([(0, ["x"] * 50)] * 4)
    log = logged(FakeCore([0] * 4), fake)
    assert [at for at, entry in enumerate(log) if entry[0] == "ticked"] == [50, 101, 152, 203]


def test_a_core_that_is_not_to_run_is_not_asked_and_one_that_fails_raises():
    run(FakeCore([]), None, None, None, lambda: False)

    def act(actions):
        raise ZeroDivisionError

    fake = FakeTime([(0, [])])
    with pytest.raises(ZeroDivisionError):
        run(FakeCore([0]), fake.poll, act, fake, fake.running)
