"""Delivery to clients: validates requests, keeps the messages of each choice in its outbox and sends them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from tetri.core.actions import Action, Detokenize, Detokenized, Release, Reply, Submitted, Undelivered
from tetri.core.broker.connections import Connections
from tetri.core.broker.observer import Observer
from tetri.core.broker.requests import TEXT_BYTES, Choice, Request, Table, needed_bytes
from tetri.core.broker.slo import result
from tetri.request import (
    MAX_DEADLINE_S,
    Sampling,
    Slo,
    Stage,
    Token,
    Usage,
    choices_problem,
    sampling_problem,
    slo_problem,
)
from tetri.wire.clients import Accepted, Delta, Done, Refused, Submit

MAX_ATTEMPTS = 8
RETRY_AFTER_S = 1.0  # when a client may try again what is refused because too much is open
SECRET_CHARS = 22  # least characters of a secret: as many as 128 bits have in base64
ANOTHERS = "this key stands for another request: draw a new key for each request"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on requests and timeouts. `context` is in tokens, names that end with `_s` are in seconds."""

    context: int
    vocabulary: int
    max_open: int = 4096
    max_mib: int = 1024  # of memory for all requests, those included that have ended and are not forgotten
    max_attempts: int = MAX_ATTEMPTS  # attempts that count (Lifecycle.restart); of all, MOST_LOST times as many
    max_deaths: int = 3  # workers that a request may kill, the last one alone (suspects.py)
    heartbeat_s: float = 0.2
    dead_s: float = 20.0
    patience_s: float = 60.0
    client_grace_s: float = 5.0
    retry_s: float = 0.05  # first wait before sending again to a client whose queue was full
    timelines_mib: int = 64  # of memory for timelines of ended choices; those of open ones take at most as much again
    ready_s: float = 30.0  # for so long a hand-over shows that its pair of instances carries KV (readiness.py)
    quiet_s: float = 1.0  # a client with open requests hears something at least this often


class Problem(NamedTuple):
    """Why a Submit is refused. `reason`: a label of `requests_refused` (docs/metrics.md); `why`: in one line."""

    reason: str
    why: str


_STAGE_OF = {"cancelled": Stage.CANCELLED, "error": Stage.FAILED, "deadline": Stage.FAILED}
_NAMES = [(stage, stage.value) for stage in Stage]


class Delivery:
    """Opens requests and closes choices for clients, and fills their outboxes. Shares the broker's request table and
    its observer."""

    def __init__(self, table: Table, limits: Limits, rng: Random, observer: Observer) -> None:
        self.table, self.limits, self.rng, self.observer = table, limits, rng, observer
        self.connections = Connections(limits.retry_s, limits.quiet_s)

    def problem(self, event: Submitted, sampling: Sampling) -> Problem | None:
        """Why a request can never be served, in one line that states what is allowed; None if it can."""
        context, prompt, most = self.limits.context, len(event.prompt), sampling.max_tokens
        wrong = problem_without_prompt(event)
        if wrong is not None:
            return Problem("invalid", wrong)
        if prompt == 0:
            return Problem("invalid", "the prompt is empty: give at least one token")
        if (problem := problem_of_length(prompt, context)) is not None:
            return problem
        if (wrong := self._unknown_id(event.prompt, sampling)) is not None:
            return Problem("invalid", f"{wrong} is outside the model's vocabulary of {self.limits.vocabulary}")
        if prompt + most > context:
            why = f"max_tokens is {most}, after this prompt the context has room for {context - prompt}"
            return Problem("too_long", why)
        if sampling.min_tokens > most:
            least = sampling.min_tokens
            return Problem("invalid", f"min_tokens is {least}, after this prompt there is space for {most}")
        if (size := needed_bytes(prompt, most, event.n, sampling)) > self.limits.max_mib << 20:
            why = f"the request may need {size} bytes, the broker has {self.limits.max_mib} MiB for all requests"
            return Problem("too_long", why)
        return None

    def _unknown_id(self, prompt: Sequence[int], sampling: Sampling) -> str | None:
        """Which ids of a request are not in the vocabulary; None if all are."""
        vocabulary, ids = self.limits.vocabulary, set(prompt)  # mostly many are alike
        if min(ids) < 0 or max(ids) >= vocabulary:
            return "a prompt token"
        if max(sampling.logit_bias, default=0) >= vocabulary:
            return "an id of logit_bias"
        return "an id of stop_token_ids" if max(sampling.stop_token_ids, default=0) >= vocabulary else None

    def admit(self, event: Submitted, sampling: Sampling, slo: Slo, now: float) -> tuple[Request, list[Action]]:
        """Open a request with these limits of latency. A sampled one gets a seed if it has none: a later attempt on
        another worker can then continue the same output."""
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = sampling.changed(seed=self.rng.getrandbits(62))
        arrival = now - event.waited_s
        request = Request(
            *(event.rid, event.key, event.client, array("I", event.prompt), arrival),
            deadline=None if event.deadline_s is None else arrival + event.deadline_s,
            slo=slo,
            secret=event.secret,
            content=event.content,
        )
        request.choices = [Choice(request, index, sampling.for_choice(index)) for index in range(event.n)]
        self.observer.accepted(request)
        self.table.add(request, now)
        self.connections.stream(request, event.client, now)
        return request, [Reply(event.client, _accepted(request))]

    def again(self, request: Request, client: bytes, now: float) -> list[Action]:
        """The answer to a repeated Submit: Accepted and everything from the first token of each choice."""
        for choice in request.choices:
            choice.outbox.send_from(0)
        return [Reply(client, _accepted(request)), *self.attach(request.choices[0], client, 0, now)]

    def attach(self, choice: Choice, client: bytes, start: int, now: float) -> list[Action]:
        """Send the client everything of a choice from token `start` on, or an empty Delta if there is nothing yet. The
        client replaces the request's earlier one."""
        choice.outbox.send_from(start)
        self.connections.stream(choice.request, client, now)
        return self.connections.attached(choice, start, now)

    def undelivered(self, event: Undelivered, now: float) -> list[Request]:
        """Mark a message that did not reach its client as unsent. Returns the open requests that have lost their
        client."""
        message = event.message
        if isinstance(message, Delta | Done):
            request = self.table.requests.get(message.rid)
            if request is not None and request.client == event.client:
                choice = request.choices[message.choice]
                if choice.outbox.unsend(message):
                    self.connections.full(choice, now)
        return self.connections.gone(event.client) if event.gone else []

    def detokenize(self, choice: Choice, *, final: bool) -> Detokenize:
        """Ask the detokenizer for the text of the new output tokens. `final`: no more tokens follow."""
        start, choice.asked = choice.asked, len(choice.output)
        return Detokenize(choice.id, start, tuple(choice.output[start:]), final, choice.sampling)

    def detokenized(self, choice: Choice, event: Detokenized, now: float) -> list[Action]:
        """Send the text that the detokenizer returned. A stop text in it ends the choice; tokens after the stop text
        are cut off the output."""
        ids: list[Token] = list(event.ids)
        start, text = event.start, event.text
        if event.counted is not None:
            choice.cut(event.counted)
            del ids[max(event.counted - start, 0) :]
            choice.asked, choice.reason, choice.error = len(choice.output), "stop", None
        if not (ids or text):
            return []
        if choice.logprobs is not None:
            ids = choice.logprobs[start : start + len(ids)]
        if choice.outbox.add(start, ids, text) > TEXT_BYTES * choice.sampling.max_tokens:
            self.table.weigh(choice.request)
        return self.connections.deliver(choice, now)

    def finish(self, choice: Choice, now: float) -> list[Action]:
        """Close a choice: append the Done, the last message of its outbox, and send it to watchers too."""
        assert choice.reason is not None
        request = choice.request
        ttft_s = None if choice.first_at is None else choice.first_at - request.arrival
        self.table.move(choice, _STAGE_OF.get(choice.reason, Stage.DONE), now)
        done = Done(
            rid=request.rid,
            reason=choice.reason,
            usage=Usage(prompt_tokens=len(request.prompt), completion_tokens=len(choice.output)),
            timeline={name: choice.spent[stage] for stage, name in _NAMES if stage in choice.spent},
            ttft_s=ttft_s,
            jct_s=now - request.arrival,
            receipt=choice.receipt(),
            error=choice.error,
            choice=choice.index,
            slo=request.slo,
            slo_result=result(choice, ttft_s, now - request.arrival),
        )
        choice.outbox.end(done)
        self.observer.ended(choice, done, now)
        watchers = [Reply(client, done) for client in request.watchers if client != request.client]
        actions = [*self.connections.deliver(choice, now), *watchers, Release(choice.id)]
        self.connections.ended(choice)
        return actions


def problem_without_prompt(asked: Submitted | Submit) -> str | None:
    """As `Delivery.problem`, but only what does not depend on the prompt, which may not be tokenized yet."""
    secret, deadline_s = asked.secret, asked.deadline_s
    if (wrong := sampling_problem(asked.sampling, asked.default_tokens)) is not None:
        return wrong
    if (wrong := slo_problem(asked.slo)) is not None:
        return wrong
    if len(secret) < SECRET_CHARS:
        return f"the secret has {len(secret)} characters, at least {SECRET_CHARS} are needed: draw 128 bits"
    if deadline_s is not None and not 0 < deadline_s <= MAX_DEADLINE_S:
        return f"deadline_s must be above 0 and at most {MAX_DEADLINE_S:g}, got {deadline_s:g}"
    return choices_problem(asked.n, asked.sampling)


def problem_of_length(prompt: int, context: int) -> Problem | None:
    """Why a prompt of so many tokens does not fit into the model's context; None if it does."""
    if prompt < context:
        return None
    why = f"the prompt has {prompt} tokens, the model's context holds {context}: shorten the prompt"
    return Problem("too_long", why)


def _accepted(request: Request) -> Accepted:
    prompt, most = len(request.prompt), request.choices[0].sampling.max_tokens
    return Accepted(key=request.key, rid=request.rid, prompt_tokens=prompt, max_tokens=most)


def refuse(client: bytes, key: str, why: str, retry_after_s: float | None = None) -> Reply:
    """The reply that refuses the request or role change of `key`; None in `retry_after_s`: a retry is of no use."""
    return Reply(client, Refused(key=key, reason=why, retry_after_s=retry_after_s))
