import os
import threading
import time

import pytest

from tetri.bench.compare.awake import LATE_S, Awake


def tickers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("awake")]


def test_a_thread_on_each_cpu_as_long_as_it_is_entered():
    with Awake() as awake:
        assert len(tickers()) == len(os.sched_getaffinity(0))
        policies = {os.sched_getscheduler(thread.native_id) for thread in tickers()}
        assert policies == {os.SCHED_FIFO if awake.real_time else os.SCHED_OTHER}
    assert tickers() == []


def test_they_only_watch_where_they_may_not_be_real_time(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with Awake() as awake:
        assert not awake.real_time and len(tickers()) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_standstill_is_noticed_once(monkeypatch, wanted):
    """The clock jumps, as it does for a thread that was not run."""
    jump = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + jump[0])
    with Awake(wanted) as awake:
        awake.standstills()
        jump[0] = 100.0
        end = time.perf_counter() + 20
        found = []
        while not found and time.perf_counter() < end:
            found = awake.standstills()
            time.sleep(0.01)
        assert 100 - LATE_S < found[0] < 120
