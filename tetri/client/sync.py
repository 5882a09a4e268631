"""The blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeAlias, TypeVar

from tetri.client.conversation import Call, Request
from tetri.client.facade import BaseClient, BaseStream, Iteration, Messages, PieceT, Prompt
from tetri.client.frames import Event, Result, TetriError
from tetri.client.questions import Explanation, Inspection, ObservationQuestion, ReadinessCheck
from tetri.request import Slo

T = TypeVar("T")
Events: TypeAlias = "Stream[Event]"


class Client(BaseClient["Stream[str]", "Events"]):
    """One connection to a broker. Not thread-safe: create one for each thread, and after a fork one in the child.

    `address`: the broker's address; by default that of this machine's deployment. `timeout`: seconds without an
    answer after which every method raises Unreachable. The keyword arguments of a request are the fields of
    `tetri.request.AskedSampling`: max_tokens, temperature, top_p, top_k, min_p, seed, stop, logprobs, logit_bias, ...
    """

    def generate(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        n: int = 1,
        deadline_s: float | None = None,
        slo: Slo | None = None,
        **sampling: Any,
    ) -> Result:
        """Return the whole answer to a prompt (text or token ids) or to chat messages; of `n` answers the first, which
        has all as its `choices`. Raises TetriError."""
        return self.events(prompt, messages=messages, n=n, deadline_s=deadline_s, slo=slo, **sampling).wait()

    def cancel(self, rid: str) -> None:
        """Cancel a request of this client and wait for the broker's confirmation. Raises TetriError."""
        self._finish(self._cancellation(rid))

    def status(self) -> dict[str, Any]:
        """Return the cluster's status: instances, requests, counters, model, monitor, notes on what is degraded."""
        return self._finish(self._ask(Inspection))

    def observe(self, epoch: int = 0, since: int = 0) -> dict[str, Any]:
        """Return what has happened since the Observation with this `epoch` and `serial` (docs/protocol.md): status,
        measures, moves of requests, ends and events. Without them: all that the broker keeps."""
        return self._finish(self._ask(ObservationQuestion, epoch, since))

    def explain(self, rid: str, choice: int = 0) -> dict[str, Any]:
        """Return how a choice of a request was served, or is: its stages, events and engine steps (docs/protocol.md,
        Timeline). `rid`: the id of the request. Raises RequestRefused if the broker knows nothing of it."""
        return self._finish(self._ask(Explanation, rid, choice))

    def readiness(self) -> dict[str, Any]:
        """Return whether each pair of instances has lately carried KV: ready, why not, pairs. The answer comes at once;
        while somebody asks, the broker tries the pairs that have no traffic."""
        return self._finish(self._ask(ReadinessCheck))

    def close(self) -> None:
        """Cancel all open requests, fail all open calls with TetriError and close the connection."""
        with self._alone():
            self._shut()
            self._session.fail(TetriError("the client was closed"))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prepare(self) -> None:
        self._lock = threading.RLock()  # of the thread that uses the client at this moment
        self._draining = False

    def _streaming(self, request: Request, waits: Callable[[], bool], read: Callable[[], PieceT]) -> Stream[PieceT]:
        return Stream(self, request, waits, read)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises TetriError while another thread is in here: two threads in one socket would end the process."""
        if not self._lock.acquire(blocking=False):
            raise TetriError("another thread is using this client: create one for each thread")
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._lock.release()

    def _start(self, call: Call[Any]) -> None:
        with self._alone():
            self._drain()
            self._session.add(call)
            self._send()

    def _cancel(self, request: Request) -> None:
        self._session.cancel(request)
        # Otherwise a signal handler has interrupted this client: the next turn sends the Cancel.
        if not (self._draining or self._session.busy):
            with self._alone():
                self._drain()
                self._send()

    def _finish(self, call: Call[T]) -> T:
        while not call.ended:
            self._turn()
        return call.outcome()

    def _turn(self) -> None:
        """Receive all waiting messages, then send what is due. If none waited, wait for the next reply or deadline."""
        with self._alone():
            came = self._drain()
            self._send()
            deadline = self._session.deadline()
            if came or deadline is None:
                return
            wait_s = max(0.0, deadline - self._clock.now())
            self._clock.listen(wait_s)
            self._connection.poll(wait_s)
            self._clock.now()
            self._clock.listen(0)
            self._drain()

    def _drain(self) -> bool:
        """Receive all replies that wait; return whether there was one. Call it before `_send`, which checks for
        timeouts: the caller may have been busy while the broker answered."""
        came, self._draining = False, True
        try:
            while (frames := self._connection.receive()) is not None:
                self._session.receive(frames, self._clock.now())
                came = True
        finally:
            self._draining = False
        return came


class Stream(BaseStream[Client, PieceT]):
    """The streamed answer to one request: iterate over it, then read `result`.

    The request is cancelled when a loop over the stream ends early (by `break`, `return` or an exception, Ctrl-C
    included), when a `with` block is left early, and when nothing holds the stream any more. What had arrived can
    still be read. To read some pieces and the others later, call `next(stream)`."""

    def __iter__(self) -> Iterator[PieceT]:
        return _Iteration(self)

    def __next__(self) -> PieceT:
        try:
            while not self._ready():
                self._client._turn()
        except BaseException:
            self._abandon()
            raise
        piece = self._piece()
        if piece is None:
            raise StopIteration
        return piece

    def wait(self) -> Result:
        """Wait for the end of the request and return its result. Raises TetriError."""
        try:
            return self._client._finish(self._request)
        finally:
            self._abandon()

    def cancel(self) -> Result:
        """Cancel the request and wait for its end. The result has the output so far. Raises TetriError."""
        self.cancel_soon()
        return self.wait()

    def cancel_soon(self) -> None:
        """Cancel the request without waiting: keep iterating until it ends. Signal handlers may call this."""
        self._client._cancel(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._wanted():
            self.cancel()


class _Iteration(Iteration[Stream[PieceT]], Iterator[PieceT]):
    def __next__(self) -> PieceT:
        return next(self._stream)
