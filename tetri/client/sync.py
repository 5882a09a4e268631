"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import zmq

from tetri.client.conversation import Call, Request
from tetri.client.facade import BaseClient, BaseStream, Messages, Prompt, dealer
from tetri.client.frames import Result, TetriError
from tetri.client.questions import Inspection

T = TypeVar("T")


class Client(BaseClient["Stream"]):
    """One connection to a broker. Not thread-safe: create one for each thread.

    `address`: the broker's address; by default that of this machine's deployment. `timeout`: seconds without an
    answer after which every method raises Unreachable. The keyword arguments of a request are the fields of
    `tetri.request.Sampling`: max_tokens, temperature, top_p, top_k, min_p, seed, stop, ...
    """

    def generate(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Result:
        """Return the whole answer to a prompt (text or token ids) or to chat messages. Raises TetriError."""
        return self.stream(prompt, messages=messages, deadline_s=deadline_s, **sampling).wait()

    def cancel(self, rid: str) -> None:
        """Cancel a request of this client and wait for the broker's confirmation. Raises TetriError."""
        self._finish(self._cancellation(rid))

    def status(self) -> dict[str, Any]:
        """Return the cluster's status: instances, requests, counters, model, monitor, notes on what is degraded."""
        return self._finish(self._ask(Inspection))

    def close(self) -> None:
        """Fail all open calls with TetriError and close the connection."""
        self._session.fail(TetriError("the client was closed"))
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _connect(self) -> None:
        self._socket = dealer(zmq.Context.instance(), self.address)
        self._draining = False

    def _streaming(self, request: Request) -> Stream:
        return Stream(self, request)

    def _start(self, call: Call[Any]) -> None:
        self._drain()
        self._session.add(call)
        self._send()

    def _cancel(self, request: Request) -> None:
        self._session.cancel(request, self._clock.now())
        # Otherwise a signal handler has interrupted this client: the next turn sends the Cancel.
        if not (self._draining or self._session.busy):
            self._drain()
            self._send()

    def _finish(self, call: Call[T]) -> T:
        while not call.ended:
            self._turn()
        return call.outcome()

    def _turn(self) -> None:
        """Receive all waiting messages, then send what is due. If none waited, wait for the next reply or deadline."""
        came = self._drain()
        self._send()
        deadline = self._session.deadline()
        if came or deadline is None:
            return
        wait_s = max(0.0, deadline - self._clock.now())
        self._clock.listen(wait_s)
        self._socket.poll(1000 * wait_s + 1)
        self._clock.now()
        self._clock.listen(0)
        self._drain()

    def _drain(self) -> bool:
        """Receive all replies that wait; return whether there was one. Call it before `_send`, which checks for
        timeouts: the caller may have been busy while the broker answered."""
        self._check_open()
        came, self._draining = False, True
        try:
            while self._socket.get(zmq.EVENTS) & zmq.POLLIN:
                self._session.receive(self._socket.recv_multipart(zmq.NOBLOCK), self._clock.now())
                came = True
        finally:
            self._draining = False
        return came

    def _send(self) -> None:
        self._check_open()
        for frame in self._session.tick(self._clock.now()):
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:  # the queue is full: the frame is sent again later
                return


class Stream(BaseStream[Client]):
    """The streamed answer to one request: iterate over its text, then read `result`. Leaving a `with` block early
    cancels the request."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._ready():
            self._client._turn()
        piece = self._piece()
        if piece is None:
            raise StopIteration
        return piece

    def wait(self) -> Result:
        """Wait for the end of the request and return its result. Raises TetriError."""
        return self._client._finish(self._request)

    def cancel(self) -> Result:
        """Cancel the request and wait for its end. The result has the output so far. Raises TetriError."""
        self.cancel_soon()
        return self.wait()

    def cancel_soon(self) -> None:
        """Cancel the request without waiting: keep iterating until it ends. Signal handlers may call this."""
        self._client._cancel(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        if self._wanted():
            self.cancel()
