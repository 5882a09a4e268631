"""The asyncio client: many concurrent requests over one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from tetri.client.conversation import Call, Request
from tetri.client.facade import BaseClient, BaseStream, Messages, Prompt, dealer
from tetri.client.frames import Result, TetriError
from tetri.client.questions import Inspection

T = TypeVar("T")


class AsyncClient(BaseClient["AsyncStream"]):
    """`Client` for asyncio. Create and use it inside one event loop. Cancelling a task cancels its request."""

    async def generate(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Result:
        """Return the whole answer to a prompt (text or token ids) or to chat messages. Raises TetriError."""
        return await self.stream(prompt, messages=messages, deadline_s=deadline_s, **sampling).wait()

    async def cancel(self, rid: str) -> None:
        """Cancel a request of this client and wait for the broker's confirmation. Raises TetriError."""
        await self._finish(self._cancellation(rid))

    async def status(self) -> dict[str, Any]:
        """Return the cluster's status: instances, requests, counters, model."""
        return await self._finish(self._ask(Inspection))

    async def close(self) -> None:
        """Fail all open calls with TetriError and close the connection."""
        self._session.fail(TetriError("the client was closed"))
        if self._pump is not None:
            self._wake.set()
            await self._pump
        self._socket.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _connect(self) -> None:
        self._socket = dealer(zmq.asyncio.Context.instance(), self.address)
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    def _streaming(self, request: Request) -> AsyncStream:
        return AsyncStream(self, request)

    def _start(self, call: Call[Any]) -> None:
        self._session.calls.append(call)
        self._send()
        self._wake.set()  # the pump waits for the deadlines known before this call
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run())

    def _cancel(self, request: Request) -> None:
        request.cancel(self._clock.now())
        self._send()
        self._wake.set()

    async def _finish(self, call: Call[T]) -> T:
        await self._wait(call, lambda: call.ended)
        return call.outcome()

    async def _wait(self, call: Call[Any], done: Callable[[], object]) -> None:
        changed = asyncio.Event()
        call.listeners.append(changed.set)
        try:
            while not done():
                changed.clear()
                await changed.wait()
        finally:
            call.listeners.remove(changed.set)

    async def _run(self) -> None:
        """Send and receive while a call is open. Reads every message that has arrived before it checks for timeouts:
        the event loop may have been busy while the broker answered."""
        receive = wake = None
        try:
            while self._session.calls:
                receive = receive or asyncio.ensure_future(self._socket.recv_multipart())  # done if one waits
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
        finally:  # otherwise open calls would wait forever
            for future in (receive, wake):
                if future is not None:
                    future.cancel()
            self._session.fail(TetriError("the client stopped"))

    def _send(self) -> None:
        self._check_open()
        for frame in self._session.tick(self._clock.now()):
            # zmq.asyncio tries a non-blocking send at once. A frame that cannot be queued is sent again later.
            error = self._socket.send(frame, zmq.NOBLOCK).exception()
            if error is not None and not isinstance(error, zmq.Again):
                raise error


class AsyncStream(BaseStream[AsyncClient]):
    """The streamed answer to one request: iterate over its text with `async for`, then read `result`. Leaving an
    `async with` block early cancels the request."""

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        await self._changed(self._ready)
        piece = self._piece()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def wait(self) -> Result:
        """Wait for the end of the request and return its result. Raises TetriError."""
        await self._changed(lambda: self._request.ended)
        return self._request.outcome()

    async def cancel(self) -> Result:
        """Cancel the request and wait for its end. The result has the output so far. Raises TetriError."""
        self._client._cancel(self._request)
        return await self.wait()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._wanted():
            await self.cancel()

    async def _changed(self, done: Callable[[], object]) -> None:
        try:
            await self._client._wait(self._request, done)
        except asyncio.CancelledError:
            self._client._cancel(self._request)
            raise
