"""The live cluster, and a client that notes when each token arrives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import zmq
from measure import BenchError, Run, cpu_seconds

from tetri.client.conversation import Patience, Request, Session
from tetri.client.sync import dealer, new_request
from tetri.config import Config
from tetri.proc import launch

Prompt = Sequence[int]
STEPS_AFTER = 8  # tokens of a request whose hand-over is looked at
GIVE_UP_S = 300.0


class Live:
    """Starts everything and stops it again. The client's side is this process. Raises LaunchError."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._run_dir = launch.up(config, say, GIVE_UP_S)
        self._socket = dealer(zmq.Context.instance(), config.clients_address)
        pids = json.loads((self._run_dir / launch.STATE).read_text())["pids"]
        decode = next(worker.iid for worker in config.workers if worker.role == "decode")
        self._cpu = lambda: cpu_seconds(pids[decode])

    def close(self) -> None:
        self._socket.close(0)
        launch.down(self._run_dir)

    def run(self, prompts: Sequence[Prompt], tokens: int) -> dict[str, Any]:
        """All prompts at once, streamed to the end."""
        talk = Talk(self._socket)
        requests = [talk.ask(prompt, tokens) for prompt in prompts]
        run = Run(len(prompts), tokens, self._cpu)
        while not all(request.ended for request in requests):
            now = talk.turn()
            for index, request in enumerate(requests):
                run.arrived(index, request.ids[len(run.ids[index]) :], now)
            run.look()
        talk.check()
        return run.plain()

    def idle_handovers(self, prompts: Sequence[Prompt]) -> list[dict[str, float]]:
        """One request after the other: the time from the first to the second token, and of a step after it."""
        found = []
        for prompt in prompts:
            times = self.run([prompt], STEPS_AFTER)["arrivals"][0]
            found.append(_handover(prompt, times, median(b - a for a, b in pairwise(times[1:]))))
        return found

    def busy_handovers(
        self, background: Sequence[Prompt], tokens: int, prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As `idle_handovers`, while the background decodes; the step is the background's median one."""
        talk = Talk(self._socket)
        behind = [talk.ask(prompt, tokens) for prompt in background]
        while min(len(request.ids) for request in behind) < 2:
            talk.turn()
        took, steps, seen, last = [], [], len(behind[-1].ids), time.monotonic()
        for prompt in prompts:
            request = talk.ask(prompt, STEPS_AFTER)
            times: list[float] = []
            while not request.ended:
                now = talk.turn()
                times += [now] * (len(request.ids) - len(times))
                if len(behind[-1].ids) > seen:
                    steps.append((now - last) / (len(behind[-1].ids) - seen))
                    seen, last = len(behind[-1].ids), now
            took.append(times)
        if any(request.ended for request in behind):
            raise BenchError("the background ended before the last hand-over: ask for more tokens")
        for request in behind:
            request.cancel(time.monotonic())
        while not all(request.ended for request in behind):
            talk.turn()
        talk.check()
        return [_handover(prompt, times, median(steps)) for prompt, times in zip(prompts, took, strict=True)]


def _handover(prompt: Prompt, times: Sequence[float], step_s: float) -> dict[str, float]:
    return {"prompt_tokens": len(prompt), "ms": 1000 * (times[1] - times[0]), "step_ms": 1000 * step_s}


class Talk:
    """Requests over one connection: `tetri.Client` without its iterators, for these hide when a token came."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._session = socket, Session()
        self._requests: list[Request] = []

    def ask(self, prompt: Prompt, tokens: int) -> Request:
        sampling = {"max_tokens": tokens, "ignore_eos": True}
        request = new_request(list(prompt), None, None, sampling, Patience())
        self._session.calls.append(request)
        self._requests.append(request)
        self._send()
        return request

    def turn(self) -> float:
        """Take one message, or let a deadline pass; returns when that was."""
        self._send()
        wait_s = max(0.0, (self._session.deadline() or 0.0) - time.monotonic())
        arrived = self._socket.poll(1000 * wait_s + 1)
        now = time.monotonic()
        if arrived:
            self._session.receive(self._socket.recv_multipart(zmq.NOBLOCK), now)
        return now

    def _send(self) -> None:
        for frame in self._session.tick(time.monotonic()):
            self._socket.send(frame)

    def check(self) -> None:
        for request in self._requests:
            if request.error is not None:
                raise BenchError(f"a request failed: {request.error}")
            assert request.result is not None  # or there is an error
            receipt = request.result.receipt
            if receipt.recomputed or receipt.preempted or receipt.attempts > 1:
                raise BenchError(f"a request did not go the straight way, so the round does not count: {receipt}")
