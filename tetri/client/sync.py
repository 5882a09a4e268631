"""The client for ordinary, blocking code."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import zmq

from tetri.client.clock import Clock
from tetri.client.conversation import Call, Patience, Request, Session
from tetri.client.frames import MAX_RECEIVED, Result, TetriError, submit
from tetri.client.place import find_address
from tetri.client.questions import Cancellation, Inspection, RoleQuestion
from tetri.request import Turn

Prompt = str | Sequence[int] | None
Messages = Sequence[Turn | Mapping[str, str]] | None
LINGER_MS = 200  # on close: long enough for a last Cancel to leave


def dealer(context: zmq.Context[Any], address: str) -> Any:
    """A socket towards the broker, which need not be there yet. Raises TetriError for a bad address."""
    socket = context.socket(zmq.DEALER)
    socket.linger = LINGER_MS
    socket.sndhwm = socket.rcvhwm = 1000
    socket.maxmsgsize = MAX_RECEIVED
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close(0)
        raise TetriError(f"{address!r} is no address to connect to: {error.strerror}") from None
    return socket


def new_request(
    prompt: Prompt,
    messages: Messages,
    deadline_s: float | None,
    sampling: Mapping[str, Any],
    patience: Patience,
    now: float,
) -> Request:
    """Raises BadRequest."""
    key = secrets.token_hex(8)
    return Request(key, submit(key, prompt, messages, deadline_s, sampling), patience, now)


class Client:
    """One connection to a broker. Not for several threads at once: make one each.

    `address`: the broker's; found through the run directory when not given. `timeout`: seconds without an
    answer after which every method raises Unreachable. Settings of a request are those of
    `tetri.request.Sampling`: max_tokens, temperature, top_p, top_k, min_p, seed, stop, ...
    """

    def __init__(
        self,
        address: str | None = None,
        timeout: float = 30.0,
        *,
        silence_s: float = 2.0,
        resend_s: float = 1.0,
    ) -> None:
        self.address = address or find_address()
        self._patience = Patience(timeout, silence_s, resend_s)
        self._session = Session()
        self._clock = Clock()
        self._socket = dealer(zmq.Context.instance(), self.address)
        self._draining = False

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

    def stream(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Stream:
        """An iterator over the answer's text as it appears. Raises TetriError, now or while iterating."""
        request = new_request(prompt, messages, deadline_s, sampling, self._patience, self._clock.now())
        self._drain()
        self._session.calls.append(request)
        self._send()
        return Stream(self, request)

    def cancel(self, rid: str) -> None:
        """End a request, this client's or another's, and wait until the broker has said so."""
        request = self._session.request(rid)
        if request is not None:
            request.cancel(self._clock.now())
            self._finish(request)
            return
        self._run(Cancellation(rid, self._patience, self._clock.now()))

    def status(self) -> dict[str, Any]:
        """The cluster's Status: instances, requests, counters, model."""
        call = Inspection(self._patience, self._clock.now())
        self._run(call)
        assert call.status is not None  # or _run had raised
        return call.status

    def flip(self, iid: str, role: str) -> dict[str, Any]:
        """Have an instance take new work as prefill, decode or mixed, and wait until it does: iid, role, what it was,
        and took_s, the seconds. Raises Refused with the reason, BadRequest for a role that does not exist."""
        call = RoleQuestion(secrets.token_hex(8), iid, role, self._patience, self._clock.now())
        self._run(call)
        assert call.change is not None  # or _run had raised
        return call.change

    def close(self) -> None:
        self._session.fail(TetriError("the client was closed"))
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self, call: Call) -> None:
        self._session.calls.append(call)
        self._finish(call)

    def _finish(self, call: Call) -> None:
        while not call.ended:
            self._turn()
        if call.error:
            raise call.error

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

    def _check_open(self) -> None:
        if self._socket.closed:
            raise TetriError("the client was closed")


class Stream:
    """Iterate over the pieces of text; then `result`. Leaving a `with` early cancels the request."""

    def __init__(self, client: Client, request: Request) -> None:
        self._client = client
        self._request = request

    @property
    def rid(self) -> str | None:
        """The request's id, once the broker has accepted it."""
        return self._request.rid

    @property
    def result(self) -> Result | None:
        """What there is to know at the end; None before."""
        return self._request.result

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._request.pieces and not self._request.ended:
            self._client._turn()
        if self._request.pieces:
            return self._request.pieces.popleft()
        if self._request.error:
            raise self._request.error
        raise StopIteration

    def wait(self) -> Result:
        """Run to the end and give the result."""
        self._client._finish(self._request)
        assert self._request.result is not None  # or _finish had raised
        return self._request.result

    def cancel(self) -> Result:
        """Ask for the end and wait for it; the result holds what there was."""
        self.cancel_soon()
        return self.wait()

    def cancel_soon(self) -> None:
        """Ask for the end without waiting for it: iterate on. May be called by a signal handler."""
        self._request.cancel(self._client._clock.now())
        if not self._client._draining:  # else this is a handler that came in between: the next turn sends it
            self._client._drain()
            self._client._send()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not (self._request.ended or self._request.cancelling):
            self.cancel()
