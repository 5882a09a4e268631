"""Latencies and rates of the last seconds."""

import pytest
from observed import histogram, member, observation, typed

from tetri.rates import Window, since
from tetri.wire.observation import Activity, Transferred


def seen(epoch=1, histograms=None, ended=0, kept=(0, 0), **activities):
    """activities: iid -> (incarnation, fields of its Activity)."""
    members = [member(iid, "mixed", None, did, incarnation=n) for iid, (n, did) in activities.items()]
    return typed(observation(*members, epoch=epoch, histograms=histograms, ended=ended, kept=kept))


def received(shm, stream=0):
    return {"shm": {"bytes": shm, "chunks": 1}, "stream": {"bytes": stream}}


BEFORE = seen(
    histograms={"ttft": histogram([4, 0, 0, 0], 0.2), "stage_queued": histogram([1, 0, 0, 0], 0.1)},
    ended=4,
    kept=(3, 1),
    m0=(1, {"chunk_tokens": 10, "chunk_space": 100, "decode_steps": 5, "decode_tokens": 5, "received": received(100)}),
    m1=(1, {"decode_steps": 9, "decode_tokens": 9}),
)
AFTER = seen(
    histograms={
        **{"ttft": histogram([4, 2, 2, 0], 1.2), "stage_queued": histogram([2, 1, 0, 0], 0.5)},
        **{"queue_predicted": histogram([0, 2, 0, 0], 0.3), "tpot": histogram([0, 0, 0, 0])},
    },
    ended=6,
    kept=(4, 1),
    m0=(
        *(1, {"chunk_tokens": 100, "chunk_space": 200, "decode_steps": 15, "decode_tokens": 45}
             | {"received": received(150, 7)}),
    ),
    m1=(2, {"decode_steps": 1, "decode_tokens": 3}),
)


def test_a_span_has_what_two_observations_differ_in():
    span = since(BEFORE, AFTER, 5.0)
    assert span.ttft.percentiles() == pytest.approx((0.2, 0.396)) and span.tpot is None
    assert span.queue == pytest.approx((0.15, 0.2)) and (span.seconds, span.ended) == (5.0, 2)
    assert span.slo_requests == {"met": 1, "ttft": 0}
    came = {"shm": Transferred(bytes=50), "stream": Transferred(bytes=7)}
    assert span.activities["m0"] == Activity(
        chunk_tokens=90, chunk_space=100, decode_steps=10, decode_tokens=40, received=came
    )
    assert span.goodput == 0.2
    assert span.activities["m1"] == Activity(decode_steps=1, decode_tokens=3)  # another process
    assert span.tokens == 4 + 40 + 3


def test_without_an_earlier_one_it_has_all_since_the_brokers_start():
    span = since(None, AFTER, None)
    assert (span.seconds, span.ended, span.tokens) == (None, 6, 8 + 45 + 3)
    assert since(None, seen(), None)[1:] == (None, None, (None, None), 0, {"met": 0, "ttft": 0}, 0, {})


def test_a_window_compares_with_the_oldest_that_it_keeps_and_forgets_a_broker_that_ended():
    window, at = Window(10.0), (0.0, 4.0, 9.0, 14.0)
    spans = [window.add(now, seen(ended=ended)) for now, ended in zip(at, (1, 3, 7, 20), strict=True)]
    assert [(span.seconds, span.ended) for span in spans] == [(None, 1), (4.0, 2), (9.0, 6), (10.0, 17)]
    again = window.add(15.0, seen(epoch=2, ended=2))
    assert (again.seconds, again.ended) == (None, 2)
