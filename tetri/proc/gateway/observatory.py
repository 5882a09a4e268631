"""What the gateway knows of its deployment: asks the broker, remembers the last minutes and tells who watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from tetri.client import AsyncClient, TetriError
from tetri.proc.gateway.frames import Frames, Seen
from tetri.proc.gateway.history import History
from tetri.wire.openai import ApiError

POINT_S = 1.0  # from one point to the next
WATCHED_S = 0.2  # from one question to the next while somebody watches
LATE_S = 1.0  # a broker that has not answered for so long is away
MOST_WATCHERS = 64


class Observatory:
    """`watching` counts a watcher in; `frame` has what to send next, and `later` waits for it."""

    def __init__(self, client: AsyncClient) -> None:
        self.history = History()
        self.observation: Mapping[str, Any] | None = None  # the last one, while the broker answers
        self.closed = False
        self._client, self._frames = client, Frames(self.history)
        self._watchers, self._turn, self._point_due = 0, 0, 0.0
        self._last = {"epoch": 0, "since": 0}
        self._changed, self._wanted = asyncio.Event(), asyncio.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Somebody watches while the `with` lasts. Raises ApiError if too many do."""
        if self._watchers >= MOST_WATCHERS:
            raise ApiError(503, f"{MOST_WATCHERS} others watch this gateway, and no more can: try later")
        if not self._watchers:
            self._wanted.set()
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    def frame(self, seen: Seen | None) -> tuple[bytes, Seen, int]:
        """The newest message for a watcher who has seen this, what they have seen after it, and what `later` needs."""
        return *self._frames.of(seen), self._turn

    async def later(self, turn: int) -> None:
        """Wait until there is a newer message, or the end."""
        while self._turn == turn and not self.closed:
            await self._changed.wait()

    async def explain(self, rid: str, choice: int) -> dict[str, Any]:
        """How a choice of a request was served. Raises TetriError."""
        return await self._client.explain(rid, choice)

    def close(self) -> None:
        """End all watching."""
        self.closed = True
        self._tell()

    async def run(self) -> None:
        """Ask the broker again and again."""
        try:
            while True:
                self._wanted.clear()
                began = time.monotonic()
                await self._ask()
                pause_s = (WATCHED_S if self._watchers else POINT_S) - (time.monotonic() - began)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wanted.wait(), max(pause_s, 0.0))
        finally:
            self.observation = None  # or after an error the metrics would be those of that moment for ever

    async def _ask(self) -> None:
        asked = asyncio.ensure_future(self._client.observe(**self._last))
        began = time.monotonic()
        try:
            while not (await asyncio.wait((asked,), timeout=LATE_S))[0]:
                self._away(f"the broker has not answered for {time.monotonic() - began:.0f} s")
        finally:
            asked.cancel()
        try:
            self._observed(asked.result())
        except TetriError as error:
            self._away(f"the broker does not answer: {error}")

    def _observed(self, observation: Mapping[str, Any]) -> None:
        now, at = time.monotonic(), time.time()
        self.observation = observation
        self._last = {"epoch": observation["epoch"], "since": observation["serial"]}
        self.history.ended(observation["ended"])
        if now >= self._point_due - WATCHED_S / 2:  # the nearest question to it
            self._point_due = max(self._point_due, now - WATCHED_S) + POINT_S
            self.history.advance(observation, now, at)
        self._frames.observed(observation, now, at)
        self._tell()

    def _away(self, why: str) -> None:
        self.observation = None
        self._frames.missed(why, time.monotonic(), time.time())
        self._tell()

    def _tell(self) -> None:
        self._turn += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
