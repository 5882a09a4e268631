"""The live cluster, and a client that records when each token arrives."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from tetri.bench.deployment import check_straight
from tetri.bench.overhead.measure import Run, cpu_seconds, stopped
from tetri.bench.report import BenchError, Progress
from tetri.client.connection import Connection
from tetri.client.conversation import Patience, Request
from tetri.client.facade import new_request, new_secret
from tetri.client.session import Session
from tetri.config import Config
from tetri.proc import launch

Prompt = Sequence[int]
STEPS_AFTER = 8  # output tokens of a request whose hand-over is measured
SETTLE_S = 1.0  # after a stop, until all heartbeats have arrived again
PAUSE_S = 0.2  # longest random pause before each of them: several steps
GIVE_UP_S = 300.0


class Live:
    """A running cluster whose client is this process. Raises LaunchError."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self._progress = progress
        self._enough = 0  # output tokens that made the last background long enough
        self._run_dir = launch.up(config, progress, GIVE_UP_S)
        self._connection = Connection(config.clients_address)
        pids = json.loads((self._run_dir / launch.STATE).read_text())["pids"]
        decode = next(worker.iid for worker in config.workers if worker.role == "decode")
        self._cpu = lambda: cpu_seconds(pids[decode])
        self._pids = [pids[name] for name in ("broker", *(worker.iid for worker in config.workers))]

    def close(self) -> None:
        """Stop the cluster."""
        self._connection.close()
        launch.down(self._run_dir)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop all processes (SIGSTOP) in this context; they send no heartbeats either."""
        with stopped(self._pids):
            yield
        time.sleep(SETTLE_S)

    def run(self, prompts: Sequence[Prompt], tokens: int) -> dict[str, Any]:
        """Run all prompts at once with `tokens` greedy tokens each; return `Run.plain`. Raises BenchError."""
        talk = Talk(self._connection)
        for prompt in prompts:
            talk.ask(prompt, tokens)
        run = Run(talk.arrivals, tokens, self._cpu)
        while talk.open(0):
            talk.turn()
            run.look()
        talk.check()
        return run.plain([request.outcome().token_ids for request in talk.requests])

    def idle_handovers(self, prompts: Sequence[Prompt]) -> list[dict[str, float]]:
        """Send one request after the other; return the time from the first to the second token, and of later steps."""
        found = []
        for prompt in prompts:
            times = self.run([prompt], STEPS_AFTER)["arrivals"][0]
            found.append(_handover(prompt, times, _step(times[1:])))
        return found

    def busy_handovers(
        self, background: Sequence[Prompt], tokens: int, most: int, prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As `idle_handovers`, while the background requests decode, whose steps are reported.

        Each background request asks for `tokens` output tokens. If the background ends before the last hand-over, the
        measurement is repeated with twice as many, up to `most`. Raises BenchError if that is not enough."""
        tokens = min(max(tokens, self._enough), most)
        while (found := self._while_busy(background, tokens, prompts)) is None:
            if tokens == most:
                raise BenchError(f"the background ended before the last hand-over, even with the most tokens, {most}")
            tokens = min(2 * tokens, most)
            self._progress(f"the background ended before the last hand-over: trying again with {tokens} tokens")
        self._enough = tokens
        return found

    def _while_busy(
        self, background: Sequence[Prompt], tokens: int, prompts: Sequence[Prompt]
    ) -> list[dict[str, float]] | None:
        """Measure once. Returns None if the background ended before the last hand-over."""
        talk, chance = Talk(self._connection), Random(7)
        for prompt in background:
            talk.ask(prompt, tokens)
        while min(map(len, talk.arrivals)) < 2:
            talk.turn()
        begun = len(talk.arrivals[0])
        for prompt in prompts:
            # The previous request ended with a step: without a pause, all would arrive at the same point of a step.
            until = time.monotonic() + chance.uniform(0.0, PAUSE_S)
            while time.monotonic() < until:
                talk.turn()
            talk.ask(prompt, STEPS_AFTER)
            while talk.open(len(background)):
                talk.turn()
            if any(request.ended for request in talk.requests[: len(background)]):
                break
        lasted = not any(request.ended for request in talk.requests[: len(background)])
        steps, handed = talk.arrivals[0][begun:], talk.arrivals[len(background) :]
        for request in talk.requests[: len(background)]:
            if not request.ended:
                request.cancel()
        while talk.open(0):
            talk.turn()
        talk.check()
        if not lasted:
            return None
        return [_handover(prompt, times, _step(steps)) for prompt, times in zip(prompts, handed, strict=True)]


def _step(times: Sequence[float]) -> float:
    return median(b - a for a, b in pairwise(times))


def _handover(prompt: Prompt, times: Sequence[float], step_s: float) -> dict[str, float]:
    return {"prompt_tokens": len(prompt), "ms": 1000 * (times[1] - times[0]), "step_ms": 1000 * step_s}


class Talk:
    """Requests over one connection, like `tetri.Client` but without iterators, which hide the arrival times.
    `arrivals`: the times of each request's tokens, in seconds."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._session, self._secret = connection, Session(), new_secret()
        self.requests: list[Request] = []
        self.arrivals: list[list[float]] = []

    def ask(self, prompt: Prompt, tokens: int) -> None:
        """Submit a request for `tokens` greedy tokens."""
        sampling = {"max_tokens": tokens, "ignore_eos": True}
        request = new_request(self._secret, list(prompt), None, sampling, Patience(), time.monotonic())
        self._session.add(request)
        self.requests.append(request)
        self.arrivals.append([])
        self._send()

    def open(self, first: int) -> bool:
        """Whether any request with an index of at least `first` is open."""
        return not all(request.ended for request in self.requests[first:])

    def turn(self) -> None:
        """Receive one message, or wait until the next deadline."""
        self._send()
        wait_s = max(0.0, (self._session.deadline() or 0.0) - time.monotonic())
        self._connection.poll(wait_s)
        if (frames := self._connection.receive()) is None:
            return
        now = time.monotonic()
        self._session.receive(frames, now)
        for request, times in zip(self.requests, self.arrivals, strict=True):
            times += [now] * (len(request.choices[0].tokens) - len(times))

    def _send(self) -> None:
        for frame in self._session.tick(time.monotonic()):
            self._connection.send(frame)

    def check(self) -> None:
        """Raise BenchError if a request failed, or was restarted, preempted or recomputed."""
        for request in self.requests:
            if request.error is not None:
                raise BenchError(f"a request failed: {request.error}")
            check_straight(request.outcome().receipt)
