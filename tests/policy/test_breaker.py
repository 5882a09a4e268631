"""Which instances get no KV for now: pauses that double, one probe at a time, and what instances say of themselves."""

from random import Random

import pytest

from tetri.policy.breaker import FIRST_S, SPREAD, Breaker


class Lowest(Random):
    """Every pause has its shortest length."""

    def random(self):
        return 0.0


@pytest.fixture
def breaker():
    return Breaker(Lowest(), longest_s=1.0)


def pauses(breaker, failures, now=0.0):
    """How long each pause is, when a probe follows it at once and fails."""
    found = []
    for number in range(failures):
        breaker.failed("d1", number, "lost", now)
        found.append(breaker.failing["d1"].until - now)
        now += found[-1]
        breaker.probe("d1", number + 1)
    return found


def test_pauses_double_up_to_the_longest(breaker):
    assert pauses(breaker, 6) == pytest.approx([FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 1.0, 1.0, 1.0])


def test_pauses_are_longer_by_chance_so_that_probes_of_many_are_not_sent_at_once():
    found = [pauses(Breaker(Random(seed), longest_s=1.0), 1)[0] for seed in range(50)]
    assert FIRST_S <= min(found) < 1.1 * FIRST_S and 0.9 * SPREAD * FIRST_S < max(found) <= SPREAD * FIRST_S


def test_one_probe_at_a_time_follows_a_pause(breaker):
    assert breaker.allowed("d1", 0.0) and breaker.blocked(0.0) == []
    breaker.failed("d1", 1, "lost", 0.0)
    assert breaker.blocked(0.19) == ["d1"] and not breaker.allowed("d1", 0.19) and breaker.allowed("d2", 0.19)
    assert breaker.allowed("d1", 0.2)
    breaker.probe("d1", 2)
    assert not breaker.allowed("d1", 99.0)
    breaker.ended("d1", 1)  # an offer of before
    assert not breaker.allowed("d1", 99.0)
    breaker.ended("d1", 2)  # it was cancelled: another may be the probe
    assert breaker.allowed("d1", 0.2)


def test_after_a_success_an_instance_is_as_any_other(breaker):
    pauses(breaker, 4)
    breaker.succeeded("d1")
    breaker.succeeded("d2")
    assert breaker.allowed("d1", 0.0) and pauses(breaker, 1) == pytest.approx([FIRST_S])


def test_offers_of_before_the_first_failure_prolong_no_pause(breaker):
    for number in range(20):
        breaker.failed("d1", number, f"chunk {number} is lost", 0.0)
    assert breaker.allowed("d1", FIRST_S) and breaker.failing["d1"].why == "chunk 19 is lost"


def test_an_instance_that_reports_to_read_nobody_is_paused_until_it_reports_otherwise(breaker):
    breaker.warn({"d1": 2}, 0.0)
    assert not breaker.allowed("d1", 0.19) and breaker.allowed("d1", FIRST_S)
    breaker.warn({"d1": 2}, 0.1)  # the same report
    assert breaker.allowed("d1", FIRST_S)
    breaker.warn({"d1": 3}, 0.2)  # the probe of another instance has failed
    assert not breaker.allowed("d1", 0.2 + FIRST_S) and breaker.allowed("d1", 0.2 + 2 * FIRST_S)
    breaker.warn({}, 0.3)
    assert breaker.allowed("d1", 0.3) and not breaker.failing


def test_what_others_can_read_again_is_not_yet_read_from_here(breaker):
    breaker.failed("d1", 1, "lost", 0.0)
    breaker.warn({"d1": 2}, 0.1)
    breaker.warn({}, 0.2)
    assert not breaker.allowed("d1", 0.3) and breaker.failing["d1"].warned == 0


def test_of_many_instances_few_probe_one_that_stays_bad():
    """64 of them, whose views are 0.2 s old. Without the reports they would send 2,500 probes in these ten minutes."""
    breakers, reported, probes = [Breaker(Random(seed), longest_s=10.0) for seed in range(64)], [(0.0, 2)], 0
    for tick in range(6000):
        now = tick / 10
        seen = next(count for at, count in reversed(reported) if at <= max(now - 0.2, 0.0))
        for breaker in breakers:
            breaker.warn({"d1": seen}, now)
            if breaker.allowed("d1", now):
                if breaker.failing:
                    breaker.probe("d1", 1)
                breaker.failed("d1", 1, "lost", now)
                probes += 1
                reported.append((now, reported[-1][1] + 1))
    assert 30 < probes < 200, probes
