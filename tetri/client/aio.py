"""The asyncio client: many concurrent requests over one connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Self, TypeAlias, TypeVar

from tetri.client.conversation import Call, Request
from tetri.client.facade import BaseClient, BaseStream, Iteration, Messages, PieceT, Prompt
from tetri.client.frames import Event, Result, TetriError
from tetri.client.questions import Explanation, Inspection, ObservationQuestion, ReadinessCheck
from tetri.request import Slo

T = TypeVar("T")
AsyncEvents: TypeAlias = "AsyncStream[Event]"
BURST = 256  # replies that are received before the callers have their turn


class AsyncClient(BaseClient["AsyncStream[str]", "AsyncEvents"]):
    """`Client` for asyncio. Create and use it inside one event loop. Cancelling a task cancels its request."""

    async def generate(
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
        return await self.events(prompt, messages=messages, n=n, deadline_s=deadline_s, slo=slo, **sampling).wait()

    async def cancel(self, rid: str) -> None:
        """Cancel a request of this client and wait for the broker's confirmation. Raises TetriError."""
        await self._finish(self._cancellation(rid))

    async def status(self) -> dict[str, Any]:
        """Return the cluster's status: instances, requests, counters, model, monitor, notes on what is degraded."""
        return await self._finish(self._ask(Inspection))

    async def observe(self, epoch: int = 0, since: int = 0) -> dict[str, Any]:
        """Return what has happened since the Observation with this `epoch` and `serial` (docs/protocol.md): status,
        measures, moves of requests, ends and events. Without them: all that the broker keeps."""
        return await self._finish(self._ask(ObservationQuestion, epoch, since))

    async def explain(self, rid: str, choice: int = 0) -> dict[str, Any]:
        """Return how a choice of a request was served, or is: its stages, events and engine steps (docs/protocol.md,
        Timeline). `rid`: the id of the request. Raises RequestRefused if the broker knows nothing of it."""
        return await self._finish(self._ask(Explanation, rid, choice))

    async def readiness(self) -> dict[str, Any]:
        """Return whether each pair of instances has lately carried KV: ready, why not, pairs. The answer comes at once;
        while somebody asks, the broker tries the pairs that have no traffic."""
        return await self._finish(self._ask(ReadinessCheck))

    async def close(self) -> None:
        """Cancel all open requests, fail all open calls with TetriError and close the connection."""
        self._cancel_all()
        self._session.fail(TetriError("the client was closed"))
        try:
            if self._pump is not None and not self._pump.done() and self._connection.here:
                self._wake.set()
                await asyncio.wait([self._pump])
        finally:
            self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _prepare(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._whole: bool | None = None  # what `_drain` returned since the pump's last turn
        self._pump: asyncio.Task[None] | None = None

    def _streaming(
        self, request: Request, waits: Callable[[], bool], read: Callable[[], PieceT]
    ) -> AsyncStream[PieceT]:
        return AsyncStream(self, request, waits, read)

    def _start(self, call: Call[Any]) -> None:
        self._connection.check_process()
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise TetriError("this client belongs to another event loop: create one in each loop")
        self._loop, self._thread = loop, threading.get_ident()
        self._session.add(call)
        self._send()
        self._wake.set()  # the pump waits for the deadlines known before this call
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())

    def _cancel(self, request: Request) -> None:
        self._session.cancel(request)
        self._send()
        self._wake.set()

    def _abandon(self, request: Request) -> None:
        super()._abandon(request)
        here = self._thread == threading.get_ident()
        if here and self._loop is not None and not self._loop.is_closed():
            self._wake.set()  # sending may have used up the signal that messages have arrived

    async def _finish(self, call: Call[T]) -> T:
        await self._wait(call, lambda: call.ended)
        return call.outcome()

    async def _wait(self, call: Call[Any], done: Callable[[], object]) -> None:
        """Wait until `done()`, which is asked whenever the call has changed: a task wakes up only for what it wants."""
        if done():
            return
        self._connection.check_process()
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
        loop, error = asyncio.get_running_loop(), TetriError("the client stopped")
        readable, self._whole = None, None
        try:
            readable = self._connection.readable
            loop.add_reader(readable, self._receive)
            await self._serve(loop)
        except TetriError as broken:
            error = broken
        finally:  # otherwise open calls would wait forever
            if readable is not None:
                loop.remove_reader(readable)
            self._cancel_all()
            self._session.fail(error)

    def _receive(self) -> None:
        """Receive at once what has arrived: until then, the event loop would call this again in each of its turns."""
        with suppress(TetriError):  # the pump meets it, too
            self._whole = self._drain()
        self._wake.set()

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._session.open:
            self._wake.clear()
            whole, self._whole = self._whole, None
            if whole is None:
                whole = self._drain()
            if whole:
                self._send()
            if not whole or self._connection.waits():
                await asyncio.sleep(0)  # the callers' turn
                continue
            deadline = self._session.deadline()
            if deadline is None:
                return
            wait_s = max(0.0, deadline - self._clock.now())
            self._clock.listen(wait_s)
            timer = loop.call_later(wait_s, self._wake.set)
            await self._wake.wait()
            timer.cancel()

    def _drain(self) -> bool:
        """Receive the replies that wait, `BURST` at most; return whether these were all."""
        receive, handle, now = self._connection.receive, self._session.receive, self._clock.now()
        for _ in range(BURST):
            if (frames := receive()) is None:
                return True
            handle(frames, now)
        return False


class AsyncStream(BaseStream[AsyncClient, PieceT]):
    """The streamed answer to one request: iterate over it with `async for`, then read `result`.

    The request is cancelled when a loop over the stream ends early (by `break`, `return` or an exception), when a task
    that waits for it is cancelled, when an `async with` block is left early, and when nothing holds the stream any
    more. What had arrived can still be read. To read some pieces and the others later, await `anext(stream)`."""

    def __aiter__(self) -> AsyncIterator[PieceT]:
        return _Iteration(self)

    async def __anext__(self) -> PieceT:
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._wanted():
            await self.cancel()

    async def _changed(self, done: Callable[[], object]) -> None:
        try:
            await self._client._wait(self._request, done)
        except BaseException:
            self._abandon()
            raise


class _Iteration(Iteration[AsyncStream[PieceT]], AsyncIterator[PieceT]):
    def __anext__(self) -> Coroutine[Any, Any, PieceT]:
        return self._stream.__anext__()
