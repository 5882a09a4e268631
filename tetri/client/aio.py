"""The client for asyncio: the same conversation, many requests at once over one connection."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Any

import zmq
import zmq.asyncio

from tetri.client.clock import Clock
from tetri.client.conversation import Call, Patience, Request, Session
from tetri.client.frames import Result, TetriError
from tetri.client.place import find_address
from tetri.client.questions import Cancellation, Inspection, RoleQuestion
from tetri.client.sync import Messages, Prompt, dealer, new_request


class AsyncClient:
    """Like `Client`. Make and use it inside one event loop; cancelling a task cancels its request."""

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
        self._socket = dealer(zmq.asyncio.Context.instance(), self.address)
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    async def generate(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Result:
        """The whole answer to a prompt (text or token ids) or to a conversation. Raises TetriError."""
        return await self.stream(prompt, messages=messages, deadline_s=deadline_s, **sampling).wait()

    def stream(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> AsyncStream:
        """An asynchronous iterator over the answer's text. Raises TetriError, now or while iterating."""
        request = new_request(prompt, messages, deadline_s, sampling, self._patience, self._clock.now())
        self._start(request)
        return AsyncStream(self, request)

    async def cancel(self, rid: str) -> None:
        """End a request, this client's or another's, and wait until the broker has said so."""
        request = self._session.request(rid)
        if request is not None:
            self._cancel(request)
            await self._finish(request)
            return
        cancellation = Cancellation(rid, self._patience, self._clock.now())
        self._start(cancellation)
        await self._finish(cancellation)

    async def status(self) -> dict[str, Any]:
        """The cluster's Status: instances, requests, counters, model."""
        call = Inspection(self._patience, self._clock.now())
        self._start(call)
        await self._finish(call)
        assert call.status is not None  # or _finish had raised
        return call.status

    async def flip(self, iid: str, role: str) -> dict[str, Any]:
        """As Client.flip: iid, role, was, took_s, once the instance has taken its new role."""
        call = RoleQuestion(secrets.token_hex(8), iid, role, self._patience, self._clock.now())
        self._start(call)
        await self._finish(call)
        assert call.change is not None  # or _finish had raised
        return call.change

    async def close(self) -> None:
        self._session.fail(TetriError("the client was closed"))
        if self._pump is not None:
            self._wake.set()
            await self._pump
        self._socket.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def _start(self, call: Call) -> None:
        self._session.calls.append(call)
        self._send()
        self._wake.set()  # the pump waits for what was due before
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run())

    def _cancel(self, request: Request) -> None:
        request.cancel(self._clock.now())
        self._send()
        self._wake.set()

    async def _finish(self, call: Call) -> None:
        await self._wait(call, lambda: call.ended)
        if call.error:
            raise call.error

    async def _wait(self, call: Call, done: Callable[[], object]) -> None:
        changed = asyncio.Event()
        call.listeners.append(changed.set)
        try:
            while not done():
                changed.clear()
                await changed.wait()
        finally:
            call.listeners.remove(changed.set)

    async def _run(self) -> None:
        """Move bytes while a call is open. All that is there is read before silence is judged: the loop may have
        been busy with something else, and answered all the while."""
        receive = wake = None
        try:
            while self._session.calls:
                receive = receive or asyncio.ensure_future(self._socket.recv_multipart())  # done if there is one
                wake = wake or asyncio.ensure_future(self._wake.wait())
                if not receive.done():
                    self._send()
                deadline = self._session.deadline()
                if deadline is None:
                    break
                wait_s = max(0.0, deadline - self._clock.now())
                self._clock.listen(wait_s)
                await asyncio.wait({receive, wake}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if receive.done():
                    self._session.receive(receive.result(), self._clock.now())
                    receive = None
                if wake.done():
                    self._wake.clear()
                    wake = None
        finally:  # nobody may wait for a pump that is gone
            for future in (receive, wake):
                if future is not None:
                    future.cancel()
            self._session.fail(TetriError("the client stopped"))

    def _send(self) -> None:
        if self._socket.closed:
            raise TetriError("the client was closed")
        for frame in self._session.tick(self._clock.now()):
            # zmq.asyncio tries a non-blocking send at once. What nobody takes now will be asked again.
            error = self._socket.send(frame, zmq.NOBLOCK).exception()
            if error is not None and not isinstance(error, zmq.Again):
                raise error


class AsyncStream:
    """Iterate over the pieces of text with `async for`; then `result`. Leaving an `async with` early cancels the
    request."""

    def __init__(self, client: AsyncClient, request: Request) -> None:
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

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        await self._changed(lambda: self._request.pieces or self._request.ended)
        if self._request.pieces:
            return self._request.pieces.popleft()
        if self._request.error:
            raise self._request.error
        raise StopAsyncIteration

    async def wait(self) -> Result:
        """Run to the end and give the result."""
        await self._changed(lambda: self._request.ended)
        if self._request.error:
            raise self._request.error
        assert self._request.result is not None  # one of the two is there at the end
        return self._request.result

    async def cancel(self) -> Result:
        """Ask for the end and wait for it; the result holds what there was."""
        self._client._cancel(self._request)
        return await self.wait()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if not (self._request.ended or self._request.cancelling):
            await self.cancel()

    async def _changed(self, done: Callable[[], object]) -> None:
        try:
            await self._client._wait(self._request, done)
        except asyncio.CancelledError:
            self._client._cancel(self._request)
            raise
