import os
import signal
import threading
import time

import pytest

from tests.net.hubs import hubs
from tetri.net.loop import run
from tetri.net.signals import StopSignals


class Core:
    """Never has anything to do."""

    def tick(self, now):
        return []

    def deadline(self):
        return None


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

            def kill():
                polling.wait(5)
                os.kill(os.getpid(), number)

            killer = threading.Thread(target=kill)
            killer.start()
            start = time.monotonic()
            run(Core(), poll, lambda actions: None, time.monotonic, stop.running)
            assert time.monotonic() - start < 2
            killer.join()
            assert stop.received == number
        finally:
            stop.restore()
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
