"""The clock by which each process judges silence. Pure: the real time is the test's."""

import pytest

from tetri.clock import SLACK_S, Clock


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def clock(time):
    return Clock(time)


def test_time_in_which_the_client_listens_counts_in_full(clock, time):
    for seconds in (2.0, 0.0, 0.5):
        before = clock.now()
        clock.listen(seconds)
        time.now += seconds / 4  # somebody else looks at the clock meanwhile
        clock.now()
        time.now += 3 * seconds / 4 + SLACK_S / 2  # nobody wakes to the moment
        assert clock.now() - before == pytest.approx(seconds + SLACK_S / 2)


def test_after_a_hold_up_there_is_a_moment_left_and_time_without_listening_hardly_counts(clock, time):
    before = clock.now()
    clock.listen(2.0)
    time.now += 60.0
    assert clock.now() - before == pytest.approx(2.0 - SLACK_S)
    clock.listen(SLACK_S)
    time.now += SLACK_S
    assert clock.now() - before == pytest.approx(2.0)
    before = clock.now()
    clock.listen(2.0)
    time.now += 0.5  # something came
    clock.now()
    clock.listen(0)
    time.now += 60.0  # its caller is busy with it
    assert 0.5 < clock.now() - before < 0.5 + SLACK_S


def test_it_stands_still_for_nobody_who_is_held_up_again_and_again(clock, time):
    before = clock.now()
    for _ in range(300):
        clock.listen(SLACK_S / 100)
        time.now += 1.0
        clock.now()
    assert clock.now() - before > 2.0


@pytest.fixture
def patient(time):
    return Clock.patient(20.0, 0.0, 4.0, real=time)


def test_the_work_of_a_process_counts_in_full_up_to_a_quarter_of_its_shortest_patience(patient, time):
    assert patient.now() == time.now == 1000.0
    patient.listen(0.2)
    time.now += 0.2
    assert patient.now() == pytest.approx(1000.2)
    for _ in range(3):
        time.now += 0.9  # it computes
        patient.now()
    assert patient.now() == pytest.approx(1002.9)


def test_a_pause_counts_for_less_than_any_patience_wherever_it_falls(patient, time):
    patient.listen(0.2)
    time.now += 3600.0  # while it waits
    assert patient.now() == pytest.approx(1001.0)
    patient.listen(0.0)
    time.now += 3600.0  # while it computes
    assert patient.now() == pytest.approx(1002.0)


def test_the_clocks_of_processes_agree_although_each_may_be_held_up_while_it_starts():
    readings = []

    def slow():
        readings.append(1000.0 + len(readings) / 2)
        return readings[-1]

    clock = Clock.patient(20.0, real=slow)
    assert clock.now() == readings[-1]
