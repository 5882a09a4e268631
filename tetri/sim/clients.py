"""All clients of a simulated deployment, and what became of their requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from tetri.core.actions import Submitted
from tetri.request import Sampling
from tetri.sim.kernel import Kernel
from tetri.sim.setup import SimError
from tetri.sim.texts import RecordedText
from tetri.sim.traces import Arrival
from tetri.wire.clients import Done, Refused


@dataclass(slots=True)
class Outcome:
    """What became of a request. `state`: done, failed or refused, of which `why` says more. Times count from its
    arrival, as the broker sees them, None for what it never reached. `tpot_s`: seconds per token after the first."""

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

    def ended(self, done: Done) -> None:
        """Note what the last message of the request says of it."""
        receipt, tokens = done.receipt, done.usage.completion_tokens
        self.ttft_s, self.jct_s = done.ttft_s, done.jct_s
        if done.ttft_s is not None and tokens > 1:
            self.tpot_s = (done.jct_s - done.ttft_s) / (tokens - 1)
        self.prefill, self.decode = receipt.prefill_instance, receipt.decode_instance
        self.preempted, self.attempts = receipt.preempted or 0, receipt.attempts


@dataclass(slots=True)
class Clients:
    """They send every request when it is time and note the answers. `requests` is read one ahead, no more."""

    kernel: Kernel
    requests: Iterator[Arrival]
    submit: Callable[[Submitted], None]
    progress: Callable[[int], None] | None = None  # hears how many were answered
    outcomes: list[Outcome] = field(default_factory=list)
    answered: int = 0
    last_s: float = 0.0  # when the last answer was given
    _next: Arrival | None = None

    @property
    def open(self) -> int:
        return len(self.outcomes) - self.answered

    @property
    def over(self) -> bool:
        """Every request was sent and answered."""
        return self._next is None and not self.open

    def start(self) -> None:
        """Raises SimError when there is no request at all."""
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
            raise SimError(f"{arrival} arrives before the request before it, or never")
        if arrival.prompt < 1 or arrival.output < 1:
            raise SimError(f"{arrival} has no prompt or no output")

    def _send(self, _: Any) -> None:
        """All that arrive now."""
        while self._next is not None and self._next.at_s <= self.kernel.now:
            arrival, number = self._next, len(self.outcomes)
            self.outcomes.append(Outcome(arrival))
            self._draw()
            self._ask(number, arrival)
        if self._next is not None:
            self.kernel.at(self._next.at_s, self._send)

    def _ask(self, number: int, arrival: Arrival) -> None:
        sampling, name = Sampling(max_tokens=arrival.output, ignore_eos=True), str(number)
        if arrival.text is not None:
            sampling = Sampling(max_tokens=arrival.text.limit, seed=number)
        self.submit(Submitted(name.encode(), name, (1,) * arrival.prompt, sampling, arrival.deadline_s))

    def text_of(self, sampling: Sampling) -> RecordedText | None:
        """A request's seed names its text: as with a model, prompt and seed lead to one."""
        return None if sampling.seed is None else self.outcomes[sampling.seed].arrival.text

    def receive_reply(self, client: bytes, message: Any) -> None:
        if isinstance(message, Done):
            self._done(self.outcomes[int(client)], message)
        elif isinstance(message, Refused):
            outcome = self.outcomes[int(client)]
            outcome.state, outcome.why = "refused", message.reason
        else:
            return
        self._answered()

    def _answered(self) -> None:
        self.answered += 1
        self.last_s = self.kernel.now
        if self.progress is not None:
            self.progress(self.answered)

    def _done(self, outcome: Outcome, done: Done) -> None:
        arrival, made = outcome.arrival, done.usage
        whole = (made.prompt_tokens, made.completion_tokens) == (arrival.prompt, arrival.output)
        wanted = "length" if arrival.text is None else arrival.text.reason
        outcome.state = "done" if done.reason == wanted else "failed"
        outcome.why = "" if outcome.state == "done" else done.error or done.reason
        if outcome.state == "done" and not whole:
            raise SimError(f"{arrival} was answered with {made.prompt_tokens} + {made.completion_tokens} tokens")
        outcome.ended(done)
