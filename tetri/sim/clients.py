"""All clients of a simulated deployment, and the outcomes of their requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from tetri.core.actions import Submitted
from tetri.core.broker.delivery import SECRET_CHARS
from tetri.request import Sampling, Slo
from tetri.sim.kernel import Kernel
from tetri.sim.setup import SimError
from tetri.sim.texts import RecordedText
from tetri.sim.traces import Arrival
from tetri.wire.clients import Done, Refused


def secret_of(key: str) -> str:
    """The secret of a simulated client: one a key, as long as a broker wants it, and the same in every run."""
    return key.rjust(SECRET_CHARS, "0")


@dataclass(slots=True)
class Outcome:
    """The outcome of one request. `state`: open, done, failed or refused; `why` has the reason of the last two. Times
    are seconds from the arrival, as the broker measures them; None for a point that the request never reached.
    `tpot_s`: seconds per token after the first. `prefill`, `decode`: the instances. `slo`: its limits. Of several
    choices: the first token of any, the end of the last, the slowest; the instances of the last, and all preemptions.
    """

    arrival: Arrival
    state: str = "open"
    ttft_s: float | None = None
    jct_s: float | None = None
    tpot_s: float | None = None
    prefill: str | None = None
    decode: str | None = None
    preempted: int = 0
    attempts: int = 0
    why: str = ""
    choices: int = 0  # that have ended
    slo: Slo = Slo()

    @property
    def slo_result(self) -> str:
        """How it kept its limits: met, or which it missed (ttft, tpot, both); failed: also if it was refused."""
        if self.state != "done" or self.ttft_s is None:
            return "failed"
        return self.slo.result(self.ttft_s, self.tpot_s)

    def ended(self, done: Done, state: str, why: str) -> bool:
        """Add the times and the receipt from the Done of a choice, which ended in this state. Returns whether it is the
        last one."""
        receipt, tokens = done.receipt, done.usage.completion_tokens
        self.slo = done.slo
        self.choices += 1
        self.jct_s = max(done.jct_s, self.jct_s or 0.0)
        if done.ttft_s is not None:
            self.ttft_s = done.ttft_s if self.ttft_s is None else min(done.ttft_s, self.ttft_s)
            if tokens > 1:
                self.tpot_s = max((done.jct_s - done.ttft_s) / (tokens - 1), self.tpot_s or 0.0)
        self.prefill, self.decode = receipt.prefill_instance, receipt.decode_instance
        self.preempted += receipt.preempted or 0
        self.attempts = max(receipt.attempts, self.attempts)
        last = self.choices == self.arrival.n
        if self.state == "open" and (last or state == "failed"):
            self.state, self.why = state, why
        return last


@dataclass(slots=True)
class Clients:
    """Submit each request at its arrival time and record the answers. Reads `requests` only one ahead, so that they may
    be generated."""

    kernel: Kernel
    requests: Iterator[Arrival]
    submit: Callable[[Submitted], None]
    progress: Callable[[int], None] | None = None  # called with the number of answered requests
    outcomes: list[Outcome] = field(default_factory=list)
    answered: int = 0
    last_s: float = 0.0  # when the last request ended
    _next: Arrival | None = None

    @property
    def open(self) -> int:
        """Number of requests that have arrived and not ended."""
        return len(self.outcomes) - self.answered

    @property
    def over(self) -> bool:
        """Whether every request was submitted and has ended."""
        return self._next is None and not self.open

    def start(self) -> None:
        """Schedule the first request. Raises SimError if there is none."""
        self._draw()
        if self._next is None:
            raise SimError("there are no requests")
        self.kernel.at(self._next.at_s, self._send)

    def _draw(self) -> None:
        before, self._next = self._next, next(self.requests, None)
        arrival = self._next
        if arrival is None:
            return
        least = before.at_s if before is not None else 0.0
        if not (isfinite(arrival.at_s) and arrival.at_s >= least):
            raise SimError(f"{arrival} arrives before its predecessor, or its arrival time is not finite")
        if arrival.prompt < 1 or arrival.output < 1:
            raise SimError(f"{arrival}: prompt and output must have at least 1 token")
        if arrival.n > 1 and arrival.text is not None:
            raise SimError(f"{arrival}: a request with a recorded text has one choice")

    def _send(self, _: Any) -> None:
        """Submit the requests that arrive now."""
        while self._next is not None and self._next.at_s <= self.kernel.now:
            arrival, number = self._next, len(self.outcomes)
            self.outcomes.append(Outcome(arrival))
            self._draw()
            self._ask(number, arrival)
        if self._next is not None:
            self.kernel.at(self._next.at_s, self._send)

    def _ask(self, number: int, arrival: Arrival) -> None:
        sampling, name = Sampling(max_tokens=arrival.output, ignore_eos=True), str(number)
        if arrival.n > 1:
            sampling = sampling.changed(temperature=1.0, seed=0)
        if arrival.text is not None:
            sampling = Sampling(max_tokens=arrival.text.limit, seed=number)
        own = (name.encode(), name, secret_of(name), b"", name)  # no key is used twice
        self.submit(Submitted(*own, (1,) * arrival.prompt, sampling, arrival.deadline_s, n=arrival.n))

    def text_of(self, sampling: Sampling) -> RecordedText | None:
        """Return the recorded text of a request; the seed of its greedy sampling is its number. None without a text."""
        return None if sampling.seed is None or sampling.temperature else self.outcomes[sampling.seed].arrival.text

    def receive_reply(self, client: bytes, message: Any) -> None:
        """Handle a message from the broker to the client with this name. Raises SimError for a wrong token count."""
        outcome = self.outcomes[int(client)]
        if isinstance(message, Done):
            if not self._done(outcome, message):
                return
        elif isinstance(message, Refused):
            outcome.state, outcome.why = "refused", message.reason
        else:
            return
        self._answered()

    def _answered(self) -> None:
        self.answered += 1
        self.last_s = self.kernel.now
        if self.progress is not None:
            self.progress(self.answered)

    def _done(self, outcome: Outcome, done: Done) -> bool:
        arrival, made = outcome.arrival, done.usage
        whole = (made.prompt_tokens, made.completion_tokens) == (arrival.prompt, arrival.output)
        wanted = "length" if arrival.text is None else arrival.text.reason
        if done.reason != wanted:
            return outcome.ended(done, "failed", done.error or done.reason)
        if not whole:
            raise SimError(f"{arrival} got {made.prompt_tokens} + {made.completion_tokens} tokens")
        return outcome.ended(done, "done", "")
