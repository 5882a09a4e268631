"""Delivery to clients: validates requests, keeps the messages of each request in its outbox and sends them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from random import Random

from tetri.core.actions import Action, Detokenize, Detokenized, Release, Reply, Submitted, Undelivered
from tetri.core.broker.connections import Connections
from tetri.core.broker.requests import TEXT_BYTES, Row, Table, needed_bytes
from tetri.request import Sampling, Stage, Token, Usage, choices_problem, sampling_problem
from tetri.wire.clients import Accepted, Delta, Done, Refused, Submit

MAX_DEADLINE_S = 1e6
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
    ready_s: float = 30.0  # for so long a hand-over shows that its pair of instances carries KV (readiness.py)
    quiet_s: float = 1.0  # a client with open requests hears something at least this often


_STAGE_OF = {"cancelled": Stage.CANCELLED, "error": Stage.FAILED, "deadline": Stage.FAILED}
_NAMES = [(stage, stage.value) for stage in Stage]


class Delivery:
    """Opens and closes rows for clients and fills their outboxes. Shares the broker's request table."""

    def __init__(self, table: Table, limits: Limits, rng: Random) -> None:
        self.table, self.limits, self.rng = table, limits, rng
        self.connections = Connections(limits.retry_s, limits.quiet_s)

    def problem(self, event: Submitted, sampling: Sampling) -> str | None:
        """The reason why a request can never be served, in one line that states what is allowed; None if it can."""
        context, prompt, most = self.limits.context, len(event.prompt), sampling.max_tokens
        wrong = problem_without_prompt(event)
        if wrong is not None:
            return wrong
        if prompt == 0:
            return "the prompt is empty: give at least one token"
        if (wrong := problem_of_length(prompt, context)) is not None:
            return wrong
        if min(event.prompt) < 0 or max(event.prompt) >= self.limits.vocabulary:
            return f"a prompt token is outside the model's vocabulary of {self.limits.vocabulary}"
        if prompt + most > context:
            return f"max_tokens is {most}, after this prompt the context has room for {context - prompt}"
        if sampling.min_tokens > most:
            return f"min_tokens is {sampling.min_tokens}, after this prompt there is space for {most}"
        if (size := needed_bytes(prompt, most)) > self.limits.max_mib << 20:
            return f"the request may need {size} bytes, the broker has {self.limits.max_mib} MiB for all requests"
        return None

    def admit(self, event: Submitted, sampling: Sampling, now: float) -> tuple[Row, list[Action]]:
        """Open a row. A sampled request gets a seed if it has none: a later attempt on another worker can then
        continue the same output."""
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = sampling.changed(seed=self.rng.getrandbits(62))
        arrival = now - event.waited_s
        deadline = None if event.deadline_s is None else arrival + event.deadline_s
        row = Row(
            *(event.rid, event.key, event.client, array("I", event.prompt), sampling),
            *(arrival, Stage.QUEUED, arrival, deadline),
            secret=event.secret,
            content=event.content,
        )
        self.table.add(row)
        self.connections.stream(row, event.client, now)
        return row, [Reply(event.client, _accepted(row))]

    def again(self, row: Row, client: bytes, now: float) -> list[Action]:
        """The answer to a repeated Submit: Accepted and everything from the first token."""
        return [Reply(client, _accepted(row)), *self.attach(row, client, 0, now)]

    def attach(self, row: Row, client: bytes, start: int, now: float) -> list[Action]:
        """Send the client everything from token `start` on, or an empty Delta if there is nothing yet. The client
        replaces the row's earlier one."""
        row.outbox.send_from(start)
        self.connections.stream(row, client, now)
        return self.connections.attached(row, start, now)

    def undelivered(self, event: Undelivered, now: float) -> list[Row]:
        """Mark a message that did not reach its client as unsent. Returns the open rows that have lost their client."""
        message = event.message
        if isinstance(message, Delta | Done):
            row = self.table.rows.get(message.rid)
            if row is not None and row.client == event.client and row.outbox.unsend(message):
                self.connections.full(row, now)
        return self.connections.gone(event.client) if event.gone else []

    def detokenize(self, row: Row, *, final: bool) -> list[Action]:
        """Ask the detokenizer for the text of the new output tokens. `final`: no more tokens follow."""
        start, row.asked = row.asked, len(row.output)
        ids, sampling = tuple(row.output[start:]), row.sampling
        return [Detokenize(row.rid, start, ids, tuple(sampling.stop), final, sampling.min_tokens)]

    def detokenized(self, row: Row, event: Detokenized, now: float) -> list[Action]:
        """Send the text that the detokenizer returned. A stop text in it ends the request; tokens after the stop text
        are cut off the output."""
        ids: list[Token] = list(event.ids)
        if event.counted is not None:
            del row.output[event.counted :]
            del ids[max(event.counted - event.start, 0) :]
            row.asked, row.reason, row.error = len(row.output), "stop", None
        if ids or event.text:
            delta = Delta(rid=row.rid, start=event.start, ids=ids, text=event.text)
            if row.outbox.add(delta) > TEXT_BYTES * row.sampling.max_tokens:
                self.table.weigh(row)
        return self.connections.deliver(row, now)

    def finish(self, row: Row, now: float) -> list[Action]:
        """Close the row: append the Done, the last message of its outbox, and send it to watchers too."""
        assert row.reason is not None
        self.table.move(row, _STAGE_OF.get(row.reason, Stage.DONE), now)
        done = Done(
            rid=row.rid,
            reason=row.reason,
            usage=Usage(prompt_tokens=len(row.prompt), completion_tokens=len(row.output)),
            timeline={name: row.spent[stage] for stage, name in _NAMES if stage in row.spent},
            ttft_s=None if row.first_at is None else row.first_at - row.arrival,
            jct_s=now - row.arrival,
            receipt=row.receipt(),
            error=row.error,
        )
        row.outbox.end(done)
        watchers = [Reply(client, done) for client in row.watchers]
        actions = [*self.connections.deliver(row, now), *watchers, Release(row.rid)]
        self.connections.ended(row)
        return actions


def problem_without_prompt(asked: Submitted | Submit) -> str | None:
    """As `Delivery.problem`, but only what does not depend on the prompt, which may not be tokenized yet."""
    wrong, secret, deadline_s = sampling_problem(asked.sampling), asked.secret, asked.deadline_s
    if wrong is not None:
        return wrong
    if len(secret) < SECRET_CHARS:
        return f"the secret has {len(secret)} characters, at least {SECRET_CHARS} are needed: draw 128 bits"
    if deadline_s is not None and not 0 < deadline_s <= MAX_DEADLINE_S:
        return f"deadline_s must be above 0 and at most {MAX_DEADLINE_S:g}, got {deadline_s:g}"
    if (wrong := choices_problem(asked.n, asked.sampling)) is not None:
        return wrong
    if asked.n > 1:
        return "n above 1 is not served yet"
    if asked.sampling.logprobs is not None or asked.sampling.logit_bias or asked.sampling.stop_token_ids:
        return "logprobs, logit_bias and stop_token_ids are not served yet"
    return None


def problem_of_length(prompt: int, context: int) -> str | None:
    """Why a prompt of so many tokens does not fit into the model's context; None if it does."""
    if prompt < context:
        return None
    return f"the prompt has {prompt} tokens, the model's context holds {context}: shorten the prompt"


def _accepted(row: Row) -> Accepted:
    return Accepted(key=row.key, rid=row.rid, prompt_tokens=len(row.prompt), max_tokens=row.sampling.max_tokens)


def refuse(client: bytes, key: str, why: str, retry_after_s: float | None = None) -> Reply:
    """The reply that refuses the request or role change of `key`; None in `retry_after_s`: a retry is of no use."""
    return Reply(client, Refused(key=key, reason=why, retry_after_s=retry_after_s))
