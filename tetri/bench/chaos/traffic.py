"""The traffic of chaos: send requests, check the answers and poll the cluster's status."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tetri.client import AsyncClient, RequestFailed, Result, TetriError
from tetri.config import Config
from tetri.core.broker.delivery import MAX_ATTEMPTS
from tetri.engine.emulated import reference_tokens
from tetri.engine.salted import attempts_of, salt_of, writers
from tetri.request import Sampling, token_ids

CANCELLED, CANCEL_S = 0.03, 0.4  # share of the requests; seconds after the start within which they are cancelled
WATCH_S, SLOWEST = 0.1, 8
ASKED = ("max_tokens", "temperature", "seed", "ignore_eos", "logprobs")


def gave_up(failure: RequestFailed) -> bool:
    """Whether the broker gave up the request after the full number of attempts."""
    return str(failure).startswith("given up after") and failure.result.receipt.attempts >= MAX_ATTEMPTS


@dataclass
class Findings:
    """The results. `lives`: the last reported counters of each worker incarnation; what a worker counted after its last
    heartbeat is lost when it dies. `seconds`: how long each request was open."""

    lives: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    broker: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    chunks: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    tired: Counter[str] = field(default_factory=Counter)  # requests that were given up, by error text
    refused: Counter[str] = field(default_factory=Counter)  # other errors, by text
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)

    def add_status(self, status: dict[str, Any]) -> None:
        """Record the counters of a status."""
        self.broker = status["counters"]
        for instance in status["instances"]:
            self.lives[instance["iid"], instance["incarnation"]] = instance.get("counters", {})

    def counters(self) -> dict[str, int]:
        """Return the workers' counters, summed over all incarnations."""
        total: Counter[str] = Counter()
        for counters in self.lives.values():
            total.update(counters)
        return dict(total)


class Traffic:
    """Keeps `width` requests open. Most prompts fill a few chunks, some nearly all of a worker's memory; some requests
    have several choices or log probabilities, and some are cancelled at a random time."""

    def __init__(self, config: Config, seed: int, width: int, bound_s: float, findings: Findings) -> None:
        self.config, self.width, self.bound_s, self.findings = config, width, bound_s, findings
        self.rng = Random(seed)

    def drawn(self) -> tuple[list[int], Sampling, int]:
        """Draw a prompt, its sampling parameters and the number of choices."""
        rng, context = self.rng, self.config.emulated.context
        tokens = rng.randint(400, context - 100) if rng.random() < 0.03 else rng.randint(1, 200)
        prompt = [rng.randrange(1, self.config.emulated.vocabulary) for _ in range(tokens)]
        temperature = rng.choice((0.0, 0.0, 0.7))
        seed = rng.getrandbits(40) if temperature else None
        n = rng.choice((1, 2, 4)) if temperature and tokens <= 200 else 1
        sampling = Sampling(
            max_tokens=rng.randint(1, 24),
            temperature=temperature,
            seed=seed,
            ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice((None, None, 0, 2)),
        )
        return prompt, sampling, n

    async def ask(self, client: AsyncClient, number: int) -> None:
        """Send one request and record its result."""
        prompt, sampling, n = self.drawn()
        asked = {name: getattr(sampling, name) for name in ASKED}
        start, findings, cancelled = time.monotonic(), self.findings, self.rng.random() < CANCELLED
        stream = client.events(prompt, n=n, **asked)
        try:
            if cancelled:
                await asyncio.sleep(self.rng.uniform(0.0, CANCEL_S))
            result = await asyncio.wait_for(stream.cancel() if cancelled else stream.wait(), self.bound_s)
        except TimeoutError:
            findings.hung.append(f"request {number}: {len(prompt)} tokens, no end after {self.bound_s:g} s")
            return
        except TetriError as failure:
            kept = findings.tired if isinstance(failure, RequestFailed) and gave_up(failure) else findings.refused
            kept[str(failure)] += 1
            return
        finally:
            findings.seconds.append(time.monotonic() - start)
        for choice in result.choices:
            self.check(f"request {number}, choice {choice.choice}", prompt, sampling.for_choice(choice.choice), choice)
        findings.attempts[max(choice.receipt.attempts for choice in result.choices)] += 1
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in result.timeline.items() if seconds >= 0.01)
        line = f"{len(prompt)} + {len(result.token_ids)} tokens, attempts {result.receipt.attempts}: {stages}"
        findings.slowest = sorted([*findings.slowest, (round(findings.seconds[-1], 2), line)], reverse=True)[:SLOWEST]

    def check(self, name: str, prompt: list[int], sampling: Sampling, result: Result) -> None:
        """Compare the result of a choice with the correct tokens and check its receipt."""
        findings, receipt = self.findings, result.receipt
        wrong = (self.mixed if self.config.emulated.salt else self.differs)(prompt, sampling, result)
        if wrong is not None:
            findings.wrong.append(f"{name}: {wrong}: {receipt}")
        if result.finish_reason == "length" and receipt.adopted is None:
            findings.wrong.append(f"{name}: its worker did not report its KV, {receipt}")
        if receipt.decode_instance and (receipt.chunks or receipt.local):
            silent = receipt.recomputed and not receipt.preempted
            reported = receipt.kept + (receipt.recomputed or 0)
            if silent or (reported, receipt.prompt_tokens) != (len(prompt), len(prompt)):
                findings.wrong.append(f"{name}: computed again, {receipt}")
        findings.chunks += receipt.chunks or 0

    def differs(self, prompt: list[int], sampling: Sampling, result: Result) -> str | None:
        """Return how a result differs from the correct tokens, or None."""
        made = self.config.emulated
        right = reference_tokens(prompt, sampling, made.vocabulary, made.token_bytes)
        if result.finish_reason == "cancelled":
            right = right[: len(result.token_ids)]
        if result.token_ids != token_ids(right):
            return f"{result.token_ids} is not {token_ids(right)}"
        if sampling.logprobs is not None and (result.logprobs or []) != right:
            return f"{result.logprobs} is not {right}"
        return None

    def mixed(self, prompt: list[int], sampling: Sampling, result: Result) -> str | None:
        """Return how a result of salted engines was not written by a prefill and a decode instance in each attempt, or
        None. Of the last attempt the receipt names them."""
        made, output, receipt = self.config.emulated, result.token_ids, result.receipt
        salts = {worker.iid: salt_of(worker.iid) for worker in self.config.workers}
        found = writers(prompt, output, sampling, made.vocabulary, made.token_bytes, salts)
        attempts, last = attempts_of(found), found[receipt.continued :]
        if attempts is None or attempts > receipt.attempts:
            return f"{output} is of {found}"
        if result.finish_reason == "cancelled":
            return None
        right = all(receipt.prefill_instance in names for names in last[:1])
        right = right and all(receipt.decode_instance in names for names in last[1:])
        return None if right else f"the last of {output} are of {last}"

    async def watch(self, client: AsyncClient) -> None:
        """Poll the status until cancelled."""
        while True:
            self.findings.add_status(await client.status())
            await asyncio.sleep(WATCH_S)

    async def run(self, count: int) -> None:
        """Send `count` requests."""
        numbers = iter(range(count))

        async def one_after_another(client: AsyncClient) -> None:
            for number in numbers:
                await self.ask(client, number)

        async with AsyncClient(self.config.clients_address, timeout=self.bound_s) as client:
            watch = asyncio.create_task(self.watch(client))
            await asyncio.gather(*(one_after_another(client) for _ in range(min(self.width, count))))
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
