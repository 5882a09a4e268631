"""The asyncio client: many concurrent requests over one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from tetri.client.conversation import Call, Request
from tetri.client.facade import BaseClient, BaseStream, Messages, Prompt, dealer
from tetri.client.frames import Result, TetriError
from tetri.client.questions import Inspection

T = TypeVar("T")
BURST = 256  # replies that are received before the callers have their turn


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
        """Return the cluster's status: instances, requests, counters, model, monitor, notes on what is degraded."""
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
        self._socket = dealer(zmq.Context.instance(), self.address)
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    def _streaming(self, request: Request) -> AsyncStream:
        return AsyncStream(self, request)

    def _start(self, call: Call[Any]) -> None:
        self._session.add(call)
        self._send()
        self._wake.set()  # the pump waits for the deadlines known before this call
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run())

    def _cancel(self, request: Request) -> None:
        self._session.cancel(request, self._clock.now())
        self._send()
        self._wake.set()

    async def _finish(self, call: Call[T]) -> T:
        await self._wait(call, lambda: call.ended)
        return call.outcome()

    async def _wait(self, call: Call[Any], done: Callable[[], object]) -> None:
        """Wait until `done()`, which is asked whenever the call has changed: a task wakes up only for what it wants."""
        if done():
            return
        waiter = asyncio.get_running_loop().create_future()

        def changed() -> None:
            if not waiter.done() and done():
                waiter.set_result(None)

        call.listeners.append(changed)
        try:
            await waiter
        finally:
            call.listeners.remove(changed)

    async def _run(self) -> None:
        """Send and receive while a call is open. Reads every message that has arrived before it checks for timeouts:
        the event loop may have been busy while the broker answered."""
        loop, readable = asyncio.get_running_loop(), self._socket.get(zmq.FD)
        loop.add_reader(readable, self._wake.set)  # libzmq signals a change only: `_drain` reads until nothing waits
        try:
            while self._session.open:
                self._wake.clear()
                whole = self._drain()
                if whole:
                    self._send()
                if not whole or self._waits():
                    await asyncio.sleep(0)  # the callers' turn
                    continue
                deadline = self._session.deadline()
                if deadline is None:
                    break
                wait_s = max(0.0, deadline - self._clock.now())
                self._clock.listen(wait_s)
                timer = loop.call_later(wait_s, self._wake.set)
                await self._wake.wait()
                timer.cancel()
        finally:  # otherwise open calls would wait forever
            loop.remove_reader(readable)
            self._session.fail(TetriError("the client stopped"))

    def _waits(self) -> bool:
        """Whether a message waits. Sending may use up the signal that one has arrived, so ask after it, too."""
        return bool(self._socket.get(zmq.EVENTS) & zmq.POLLIN)

    def _drain(self) -> bool:
        """Receive the replies that wait, `BURST` at most; return whether these were all."""
        receive, handle, now = self._socket.recv_multipart, self._session.receive, self._clock.now()
        try:
            for _ in range(BURST):
                handle(receive(zmq.NOBLOCK), now)
        except zmq.Again:
            return True
        return False

    def _send(self) -> None:
        self._check_open()
        for frame in self._session.tick(self._clock.now()):
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:  # the queue is full: the frame is sent again later
                return


class AsyncStream(BaseStream[AsyncClient]):
    """The streamed answer to one request: iterate over its text with `async for`, then read `result`. Leaving an
    `async with` block early cancels the request."""

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        if not self._ready():
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
