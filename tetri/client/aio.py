"""The client for asyncio: the same conversation, many requests at once over one connection."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from tetri.client.conversation import Call, Request
from tetri.client.facade import BaseClient, BaseStream, Messages, Prompt, dealer
from tetri.client.frames import Result, TetriError
from tetri.client.questions import Inspection, RoleQuestion

T = TypeVar("T")


class AsyncClient(BaseClient["AsyncStream"]):
    """Like `Client`. Make and use it inside one event loop; cancelling a task cancels its request."""

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

    async def cancel(self, rid: str) -> None:
        """End a request, this client's or another's, and wait until the broker has said so."""
        await self._finish(self._cancellation(rid))

    async def status(self) -> dict[str, Any]:
        """The cluster's Status: instances, requests, counters, model."""
        return await self._finish(self._ask(Inspection))

    async def flip(self, iid: str, role: str) -> dict[str, Any]:
        """As Client.flip: iid, role, was, took_s, once the instance has taken its new role."""
        return await self._finish(self._ask(RoleQuestion, secrets.token_hex(8), iid, role))

    async def close(self) -> None:
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
        self._wake.set()  # the pump waits for what was due before
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
        self._check_open()
        for frame in self._session.tick(self._clock.now()):
            # zmq.asyncio tries a non-blocking send at once. What nobody takes now will be asked again.
            error = self._socket.send(frame, zmq.NOBLOCK).exception()
            if error is not None and not isinstance(error, zmq.Again):
                raise error


class AsyncStream(BaseStream[AsyncClient]):
    """Iterate over the pieces of text with `async for`; then `result`. Leaving an `async with` early cancels the
    request."""

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        await self._changed(self._ready)
        piece = self._piece()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def wait(self) -> Result:
        """Run to the end and give the result."""
        await self._changed(lambda: self._request.ended)
        return self._request.outcome()

    async def cancel(self) -> Result:
        """Ask for the end and wait for it; the result holds what there was."""
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
