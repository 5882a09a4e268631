"""The client of a comparison: asks servers of OpenAI's API for completions, and times every answer.

It is the same for all arrangements. Prompts are tokens, and answers are exactly as long as asked for: the work does not
depend on what the model says. All bodies are made before the first request is sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tetri.bench.compare.arrangements import ROUND_ROBIN
from tetri.request import Slo

SILENCE_S = 300.0  # without any byte of an answer, after which it has failed
LIMIT_HEADERS = {"ttft_s": "X-SLO-TTFT-Ms", "tpot_s": "X-SLO-TPOT-Ms"}
DATA, END = b"data: ", b"data: [DONE]"


class Answer(msgspec.Struct, array_like=True):
    """How one request went. `sent_s`: since the first one could be sent; `ttft_s`, `jct_s`: since it was sent;
    `prompt` and `output`: tokens; `longest_s`: the longest time between two of its events; `server`: which one was
    asked; `error`: why it failed, "" if it did not."""

    sent_s: float
    ttft_s: float
    jct_s: float
    prompt: int
    output: int
    longest_s: float = 0.0
    server: int = 0
    error: str = ""

    @property
    def tpot_s(self) -> float:
        """The mean time between two tokens; 0 of a single one."""
        return (self.jct_s - self.ttft_s) / (self.output - 1) if self.output > 1 else 0.0

    def keeps(self, slo: Slo) -> bool:
        """Whether it kept its limits, as far as there are any."""
        limits = ((self.ttft_s, slo.ttft_s), (self.tpot_s, slo.tpot_s))
        return not self.error and all(limit is None or seconds <= limit for seconds, limit in limits)


@dataclass(frozen=True, slots=True)
class Question:
    """One request, ready to send. `at_s`: when, since the first one can be sent."""

    at_s: float
    body: bytes
    prompt: int
    output: int


def question(at_s: float, model: str, ids: Sequence[int], output: int) -> Question:
    """A completion of these tokens, with exactly `output` tokens."""
    asked = {"model": model, "prompt": ids, "max_tokens": output, "ignore_eos": True, "temperature": 0, "stream": True}
    return Question(at_s, json.dumps(asked | {"stream_options": {"include_usage": True}}).encode(), len(ids), output)


class Choice(msgspec.Struct):
    """What is read of a choice."""

    text: str = ""


class Count(msgspec.Struct):
    """What is read of the usage."""

    completion_tokens: int


class Event(msgspec.Struct):
    """What is read of an event of a completion's stream."""

    choices: list[Choice] = []
    usage: Count | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(Event)


@dataclass
class Load:
    """Asks these servers. `headers`: of every request. `gaps_s`: the times between two events of an answer."""

    urls: Sequence[str]
    routing: str
    headers: dict[str, str] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    _open: list[int] = field(default_factory=list)
    _turn: int = -1
    _start: float = 0.0

    def at_times(self, questions: Sequence[Question]) -> list[Answer]:
        """Send each question at its time, whatever became of those before."""
        return asyncio.run(self._run(self._timed(questions)))

    def in_flight(self, questions: Sequence[Question], count: int) -> list[Answer]:
        """Keep `count` questions in flight until all are answered."""
        return asyncio.run(self._run(self._kept(questions, count)))

    async def _run(self, answers: Any) -> list[Answer]:
        import aiohttp

        self._open, before = [0] * len(self.urls), time.thread_time()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Content-Type": "application/json", **self.headers}
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as self._session:
            self._start = time.monotonic()
            try:
                made: list[Answer] = await answers
            finally:
                self.cpu_s += time.thread_time() - before
        return made

    async def _timed(self, questions: Sequence[Question]) -> list[Answer]:
        tasks = []
        for each in questions:
            await asyncio.sleep(max(0.0, self._start + each.at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self._ask(each)))
        return [*await asyncio.gather(*tasks)]

    async def _kept(self, questions: Sequence[Question], count: int) -> list[Answer]:
        left = iter(questions)
        made: list[Answer] = []

        async def asker() -> None:
            for each in left:
                made.append(await self._ask(each))

        await asyncio.gather(*(asker() for _ in range(count)))
        return made

    def _choose(self) -> int:
        if self.routing == ROUND_ROBIN:
            self._turn = (self._turn + 1) % len(self.urls)
            return self._turn
        return min(range(len(self.urls)), key=self._open.__getitem__)

    async def _ask(self, question: Question) -> Answer:
        import aiohttp

        server, sent = self._choose(), time.monotonic()
        answer = Answer(sent - self._start, 0.0, 0.0, question.prompt, question.output, 0.0, server)
        self._open[server] += 1
        try:
            async with self._session.post(f"{self.urls[server]}/v1/completions", data=question.body) as response:
                if response.status != 200:
                    answer.error = f"status {response.status}: {(await response.text())[:200]}"
                else:
                    answer.error = await self._read(response.content, answer, sent)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: no JSON
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            self._open[server] -= 1
        answer.jct_s = time.monotonic() - sent
        return answer

    async def _read(self, lines: Any, answer: Answer, sent: float) -> str:
        """Read an answer's events; return why it is not what was asked for, or ""."""
        last, tokens = 0.0, 0
        async for line in lines:
            if not line.startswith(DATA) or line.startswith(END):
                continue
            event, now = _decoder.decode(line[len(DATA) :]), time.monotonic()
            if event.error is not None:
                return f"ended with {str(event.error)[:200]}"
            if event.usage is not None:
                tokens = event.usage.completion_tokens
            if not event.choices:
                continue
            if not last:
                answer.ttft_s = now - sent
            else:
                self.gaps_s.append(now - last)
                answer.longest_s = max(answer.longest_s, now - last)
            last = now
        return "" if tokens == answer.output else f"{tokens} tokens instead of {answer.output}"


def headers_of(slo: Slo) -> dict[str, str]:
    """The headers by which a request names its limits."""
    named = {header: getattr(slo, name) for name, header in LIMIT_HEADERS.items()}
    return {header: f"{1000 * seconds:.3f}" for header, seconds in named.items() if seconds}


def capacity(answers: Iterable[Answer], in_flight: int) -> float:
    """Requests per second that were served with so many in flight: once as many have ended as were in flight at first,
    until the last one was sent."""
    rows = [*answers]
    last_sent = max(each.sent_s for each in rows)
    ends = sorted(each.sent_s + each.jct_s for each in rows if not each.error)
    ends = [end for end in ends[in_flight - 1 :] if end <= last_sent]
    return (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else 0.0
