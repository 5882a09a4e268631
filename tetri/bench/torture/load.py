"""Ordinary requests while something goes wrong: every answer is compared with the right one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

from tetri.bench.report import BenchError
from tetri.bench.torture.case import Findings
from tetri.client import AsyncClient, Result, TetriError
from tetri.config import Config
from tetri.engine.emulated import reference
from tetri.request import Sampling

WAIT_S = 60.0  # most that a request may last


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and its result."""

    prompt: list[int]
    result: Result


class Load:
    """Keeps `width` requests open, from a thread of its own, until `count` were sent or the context ends. Prompts have
    up to `longest` tokens, answers 2 to `tokens`."""

    def __init__(
        self, config: Config, width: int, count: int | None = None, longest: int = 200, tokens: int = 40
    ) -> None:
        self.config, self.width, self.count = config, width, count
        self.longest, self.tokens = longest, tokens
        self.answers: list[Answer] = []
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._rng, self._sent, self._ended = Random(width), 0, threading.Event()
        self._failure: Exception | None = None
        self._cancel: Callable[[], object] | None = None  # end all open requests
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and self._cancel is not None:
            self._cancel()
        self.finish()

    def finish(self) -> None:
        """Send no more, and wait for what is open; no longer than WAIT_S, for then a request counts as an error."""
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            raise BenchError(f"the load failed: {self._failure!r}")

    def wait(self, answers: int) -> None:
        """Wait until so many more requests have ended, or all. Raises BenchError when that lasts too long."""
        wanted, until = self.ended() + answers, time.monotonic() + WAIT_S
        while self.ended() < wanted and self._thread.is_alive():
            time.sleep(0.01)
            if time.monotonic() > until:
                raise BenchError(f"{self.ended()} of {wanted} requests have ended: {dict(self.errors)}")

    def ended(self) -> int:
        """Requests that have ended."""
        return len(self.answers) + self.errors.total()

    def attempts(self) -> dict[str, int]:
        """How many answers took how many attempts."""
        counts = Counter(answer.result.receipt.attempts for answer in self.answers)
        return {str(attempts): count for attempts, count in sorted(counts.items())}

    def most_attempts(self) -> int:
        """Of any answer; 0 if there is none."""
        return max((answer.result.receipt.attempts for answer in self.answers), default=0)

    def places(self) -> dict[str, int]:
        """How many answers were decoded where."""
        return dict(Counter(answer.result.receipt.decode_instance or "nowhere" for answer in self.answers))

    def judge(self, found: Findings) -> None:
        """Record the answers, of which none may be wrong and none be an error."""
        found.note("answers", len(self.answers))
        found.note("attempts", self.attempts())
        found.exactly("wrong", self.wrong[:3], [])
        found.exactly("errors", dict(self.errors), {})

    def _run(self) -> None:
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(self._all())
        except Exception as failure:  # `finish` raises it in the thread that waits
            self._failure = failure

    async def _all(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._cancel = lambda: None if loop.is_closed() else loop.call_soon_threadsafe(task.cancel)
        async with AsyncClient(self.config.clients_address, timeout=WAIT_S) as client:
            await asyncio.gather(*(self._one_after_another(client) for _ in range(self.width)))

    async def _one_after_another(self, client: AsyncClient) -> None:
        while not self._ended.is_set() and self._sent != self.count:
            self._sent += 1
            prompt = [self._rng.randrange(1, 32000) for _ in range(self._rng.randint(1, self.longest))]
            asked = client.generate(prompt, max_tokens=self._rng.randint(2, self.tokens), ignore_eos=True)
            try:
                answer = Answer(prompt, await asyncio.wait_for(asked, WAIT_S))
            except (TetriError, TimeoutError) as error:
                self.errors[str(error) or f"no end after {WAIT_S:g} s"] += 1
                continue
            self.answers.append(answer)
            if not self._right(answer):
                self.wrong.append(f"{answer.result.token_ids}, {answer.result.receipt}")

    def _right(self, answer: Answer) -> bool:
        made, ids = self.config.emulated, answer.result.token_ids
        sampling = Sampling(max_tokens=answer.result.usage.completion_tokens, ignore_eos=True)
        return ids == reference(answer.prompt, sampling, made.vocabulary, made.token_bytes)
