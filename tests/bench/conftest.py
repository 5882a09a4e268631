"""For tests that run a benchmark's program in this process."""

import signal

import pytest


@pytest.fixture(autouse=True, scope="module")
def signal_handlers():
    """A program sets those of its process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
