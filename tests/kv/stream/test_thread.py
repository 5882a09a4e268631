"""The thread of `stream`: its turns, its end, and the exception that ends it."""

import threading

import pytest

from tetri.kv.stream.thread import SlabThread


class Turns(SlabThread):
    """Reports its turns, and the release, in `seen`; the first turn raises `error`."""

    def __init__(self, error=None):
        self.seen, self.error, self.failed, self.turned = [], error, [], threading.Event()
        super().__init__("kv-test", self.crashed)

    def crashed(self, error):
        self.failed.append(error)
        self.turned.set()

    def timeout(self):
        return None if self.seen else 0.0

    def turn(self, ready):
        self.seen.append("turn")
        if self.error is not None:
            raise self.error
        self.turned.set()

    def release(self):
        self.seen.append("release")


@pytest.mark.parametrize("error", [None, ValueError("broken")])
def test_a_thread_ends_when_it_is_closed_and_reports_what_ended_it(error):
    thread = Turns(error)
    thread.start()
    assert thread.turned.wait(10.0)
    thread.close()
    thread.close()
    assert thread.seen[0] == "turn" and thread.seen.count("release") == 1 and thread.seen[-1] == "release"
    assert thread.failed == ([] if error is None else [error])


def test_a_thread_that_never_started_is_closed_as_well():
    thread = Turns()
    thread.close()
    assert thread.seen == ["release"]
