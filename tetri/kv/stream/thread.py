"""What both threads of `stream` share: they wait for sockets, do one turn, and end with `close`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from threading import Thread

from tetri.net.bulk import Waker, Watch

Crashed = Callable[[BaseException], None]
Wake = Callable[[], None]


class SlabThread(ABC):
    """The thread `name`. Other threads may call `start` and `close` only. `crashed` is called with the exception that
    ended the thread, if one did."""

    def __init__(self, name: str, crashed: Crashed) -> None:
        self.counters: Counter[str] = Counter()
        self._crashed, self._log = crashed, logging.getLogger("tetri.kv")
        self._waker = Waker()
        self._watch = Watch(self._waker)
        self._ending = False
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Fetches in flight get no answer. A second call does nothing."""
        if not self._ending:
            self._ending = True
            self._waker.ring()
            if self._thread.ident is not None:
                self._thread.join()
            self.release()
            self._waker.close()

    def _run(self) -> None:
        try:
            while not self._ending:
                ready = self._watch.wait(self.timeout())
                self._waker.hush()
                self.turn(ready)
        except BaseException as error:
            self._crashed(error)

    @abstractmethod
    def timeout(self) -> float | None:
        """Seconds until the next turn if no socket is readable; None: no limit."""

    @abstractmethod
    def turn(self, ready: list[object]) -> None:
        """Do what is due. `ready`: the sockets that are readable."""

    @abstractmethod
    def release(self) -> None:
        """Close the sockets, after the thread has ended."""
