import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from tests.net.hubs import hubs
from tetri.clock import Clock
from tetri.net.loop import run
from tetri.net.signals import StopSignals

IDLE = SimpleNamespace(tick=lambda now: [], deadline=lambda: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_loop_that_waits_for_ever(number):
    before = signal.getsignal(number)
    with hubs(1) as (hub,):
        stop = StopSignals(hub.wake_fd)
        try:
            polling = threading.Event()

            def poll(timeout):
                polling.set()
                return hub.poll(timeout)

            killer = threading.Thread(target=lambda: polling.wait(5) and os.kill(os.getpid(), number))
            killer.start()
            start = time.monotonic()
            run(IDLE, poll, lambda actions: None, Clock(), stop.running)
            assert time.monotonic() - start < 2
            killer.join()
            assert stop.received == number
        finally:
            stop.restore()
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
