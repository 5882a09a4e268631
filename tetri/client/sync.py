"""The client for ordinary, blocking code."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, TypeVar

import zmq

from tetri.client.conversation import Call, Request
from tetri.client.facade import BaseClient, BaseStream, Messages, Prompt, dealer
from tetri.client.frames import Result, TetriError
from tetri.client.questions import Inspection, RoleQuestion

T = TypeVar("T")


class Client(BaseClient["Stream"]):
    """One connection to a broker. Not for several threads at once: make one each.

    `address`: the broker's; found through the run directory when not given. `timeout`: seconds without an
    answer after which every method raises Unreachable. Settings of a request are those of
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
        """The whole answer to a prompt (text or token ids) or to a conversation. Raises TetriError."""
        return self.stream(prompt, messages=messages, deadline_s=deadline_s, **sampling).wait()

    def cancel(self, rid: str) -> None:
        """End a request, this client's or another's, and wait until the broker has said so."""
        self._finish(self._cancellation(rid))

    def status(self) -> dict[str, Any]:
        """The cluster's Status: instances, requests, counters, model."""
        return self._finish(self._ask(Inspection))

    def flip(self, iid: str, role: str) -> dict[str, Any]:
        """Have an instance take new work as prefill, decode or mixed, and wait until it does: iid, role, what it was,
        and took_s, the seconds. Raises Refused with the reason, BadRequest for a role that does not exist."""
        return self._finish(self._ask(RoleQuestion, secrets.token_hex(8), iid, role))

    def close(self) -> None:
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
        self._session.calls.append(call)
        self._send()

    def _cancel(self, request: Request) -> None:
        request.cancel(self._clock.now())
        if not self._draining:  # else this is a handler that came in between: the next turn sends it
            self._drain()
            self._send()

    def _finish(self, call: Call[T]) -> T:
        while not call.ended:
            self._turn()
        return call.outcome()

    def _turn(self) -> None:
        """Take what has come, send what is due; if nothing had come, wait for the next reply or deadline."""
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
        """Take all replies that are there; whether there was one. To be done before `_send`: the caller may have
        been away for longer than the time-out, and answered all the while."""
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
            except zmq.Again:  # nobody takes it for now: it will be asked again
                return


class Stream(BaseStream[Client]):
    """Iterate over the pieces of text; then `result`. Leaving a `with` early cancels the request."""

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
        """Run to the end and give the result."""
        return self._client._finish(self._request)

    def cancel(self) -> Result:
        """Ask for the end and wait for it; the result holds what there was."""
        self.cancel_soon()
        return self.wait()

    def cancel_soon(self) -> None:
        """Ask for the end without waiting for it: iterate on. May be called by a signal handler."""
        self._client._cancel(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        if self._wanted():
            self.cancel()
