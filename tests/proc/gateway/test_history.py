"""The last minutes, from Observations one second apart."""

import pytest
from observations import histogram, observation, worker

from tetri.proc.gateway.history import IDLE, KEPT, History, InstancePoint, Point, Rates


def after(*observations, seconds=1.0):
    history = History()
    for number, each in enumerate(observations):
        history.advance(each, 100 + number * seconds, 5000 + number * seconds)
    return history


def test_a_point_is_what_two_observations_differ_in():
    before = observation(
        worker(decode_tokens=100),
        counts={"requests_ended": {"stop": 2, "length": 1}},
        slo_requests={"met": 2, "ttft": 0},
        histograms={"ttft": histogram(5, 0, 0, 0, total=2.0)},
    )
    now = observation(
        worker(decode_tokens=160),
        counts={"requests_ended": {"stop": 5, "length": 2}},
        slo_requests={"met": 5, "ttft": 1},
        histograms={
            "ttft": histogram(5, 4, 0, 0, total=8.0),
            "tpot": histogram(0, 0, 1, 0, total=3.25),
            "queue_predicted": histogram(2, 0, 0, 0, total=1.0),
            "stage_queued": histogram(4, 0, 0, 0, total=1.0),
        },
    )
    (point,) = after(before, now, seconds=2.0).points
    assert point == Point(5002.0, (1.5, 1.99), (3.25, 3.25), 32.0, 2.0, (0.5, 0.25), 0.75, 1.5)


@pytest.mark.parametrize(("known", "tpot"), [([1.1, 1.3, 1.2], (1.2, 1.298)), ([1.1, 1.3], (1.5, 1.99))])
def test_percentiles_are_exact_where_all_values_are_known(known, tpot):
    history = History()
    history.advance(observation(), 100, 5000)
    history.ended({"ttft_s": None, "tpot_s": each} for each in known)
    history.advance(observation(histograms={"tpot": histogram(0, 3, 0, 0, total=3.6)}), 101, 5001)
    assert history.points[-1].tpot == pytest.approx(tpot) and history.points[-1].ttft is None
    history.advance(observation(histograms={"tpot": histogram(0, 4, 0, 0, total=5.1)}), 102, 5002)
    assert history.points[-1].tpot == pytest.approx((1.5, 1.5))  # what belongs to the point before is gone


def test_what_did_not_happen_is_none():
    (point,) = after(observation(), observation()).points
    assert point == Point(5001.0, None, None, 0.0, 0.0, None, None, 0.0)


def test_rates_of_an_instance():
    before = worker(chunk_tokens=10, chunk_space=100, decode_tokens=5, decode_steps=5, received={"shm": 1000})
    now = worker(
        **{"chunk_tokens": 60, "chunk_space": 200, "decode_tokens": 29, "decode_steps": 13},
        received={"shm": 3000, "stream": 500},
    )
    history = after(observation(before), observation(now), seconds=0.5)
    assert history.rates == {"d0": Rates(0.5, 3.0, 5000.0)}
    assert after(observation(now), observation(now)).rates == {"d0": IDLE}


def test_a_worker_that_starts_again_counts_from_its_start():
    before = worker(decode_tokens=500, decode_steps=100, chunk_space=9, chunk_tokens=9, received={"shm": 1000})
    history = after(observation(before), observation(worker(decode_tokens=3, decode_steps=2, incarnation=2)))
    assert history.rates == {"d0": Rates(batch=1.5)} and history.points[-1].tokens_s == 3


def test_a_broker_that_starts_again_makes_no_point():
    before = observation(worker(), epoch=1, counts={"requests_ended": {"stop": 9}})
    history = after(before, observation(worker(), epoch=2))
    assert not history.points and not history.rates
    history.advance(observation(worker(), epoch=2, counts={"requests_ended": {"stop": 1}}), 102, 5002)
    assert [point.requests_s for point in history.points] == [1.0]


def test_the_minutes_of_an_instance():
    loaded = {"queued": 1, "waiting": 2, "running": 3, "free_blocks": 4, "busy": 0.5}
    history = after(
        observation(worker()),
        observation(worker(load=loaded, role="mixed", state="lost", decode_tokens=6, decode_steps=2)),
    )
    assert history.instance("d0")[-1] == InstancePoint(5001.0, "mixed", "lost", 1, 2, 3, 4, 0.5, None, 3.0)
    assert history.instance("d1") is None


def test_an_instance_that_needs_more_memory_than_it_has_has_none():
    assert after(observation(worker(load={"free_blocks": -2}))).instance("d0")[-1].free == 0


def test_only_so_much_is_kept():
    history = History()
    for second in range(KEPT + 10):
        history.advance(observation(worker("p0"), *([worker("d0")] if second < 5 else [])), second, second)
    assert len(history.points) == KEPT == len(history.instance("p0")) and history.added == KEPT + 9
    assert history.instance("d0") is None and history.points[-1].at == KEPT + 9
