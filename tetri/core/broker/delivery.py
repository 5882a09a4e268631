"""The clients' side of the broker: what may be asked, and what was answered how far."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tetri.core.actions import Action, Detokenize, Detokenized, Release, Reply, Submitted, Undelivered
from tetri.core.broker.requests import Row, Table
from tetri.request import Stage, Usage, sampling_problem, with_seed
from tetri.wire.clients import Accepted, Delta, Done, Refused

MAX_DEADLINE_S = 1e6
MAX_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for, and how long things may take (seconds)."""

    context: int
    vocabulary: int
    max_open: int = 4096
    max_attempts: int = MAX_ATTEMPTS  # that count (Life.restart_all)
    heartbeat_s: float = 0.2
    dead_s: float = 20.0
    patience_s: float = 60.0
    client_grace_s: float = 5.0
    retry_s: float = 0.05  # a client whose queue was full is tried again after this


_STAGE_OF = {"cancelled": Stage.CANCELLED, "error": Stage.FAILED, "deadline": Stage.FAILED}
_NAMES = [(stage, stage.value) for stage in Stage]


class Delivery:
    def __init__(self, table: Table, limits: Limits, epoch: int, rng: Random) -> None:
        self.table, self.limits, self.rng = table, limits, rng
        self._prefix = f"{epoch & 0xFFFFFF:06x}"
        self._serial = 0

    def problem(self, event: Submitted) -> str | None:
        """Why a request can never be served, in one line that says what is allowed."""
        sampling, context, prompt = event.sampling, self.limits.context, len(event.prompt)
        wrong = sampling_problem(sampling)
        if wrong is not None:
            return wrong
        if prompt == 0:
            return "the prompt is empty: give at least one token"
        if prompt >= context:
            return f"the prompt has {prompt} tokens, the model's context holds {context}: shorten the prompt"
        if min(event.prompt) < 0 or max(event.prompt) >= self.limits.vocabulary:
            return f"a prompt token is outside the model's vocabulary of {self.limits.vocabulary}"
        if prompt + sampling.max_tokens > context:
            most = context - prompt
            return f"max_tokens is {sampling.max_tokens}, after this prompt the context has room for {most}"
        if event.deadline_s is not None and not 0 < event.deadline_s <= MAX_DEADLINE_S:
            return f"deadline_s must be above 0 and at most {MAX_DEADLINE_S:g}, got {event.deadline_s:g}"
        return None

    def admit(self, event: Submitted, now: float) -> tuple[Row, list[Action]]:
        """Open a row. A request that draws its tokens gets a seed, so that any worker can go on with it."""
        self._serial += 1
        sampling = event.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = with_seed(sampling, self.rng.getrandbits(62))
        row = Row(
            f"{self._prefix}-{self._serial}",
            event.key,
            event.client,
            event.prompt,
            sampling,
            now,
            Stage.QUEUED,
            now,
            None if event.deadline_s is None else now + event.deadline_s,
        )
        self.table.add(row)
        return row, [Reply(event.client, _accepted(row))]

    def known(self, event: Submitted) -> list[Action] | None:
        """The answer to a Submit that was sent again, None when it is new."""
        rid = self.table.keys.get(event.key)
        if rid is None:
            return None
        row = self.table.rows[rid]
        return [Reply(event.client, _accepted(row)), *self.attach(row, event.client, 0)]

    def attach(self, row: Row, client: bytes, start: int) -> list[Action]:
        """Send this client all from token `start` on; an empty delta when there is nothing (yet)."""
        row.client, row.blocked, row.sent = client, False, 0
        while row.sent < len(row.outbox) and _before(row.outbox[row.sent], start):
            row.sent += 1
        if row.sent == len(row.outbox):
            return [Reply(client, Delta(rid=row.rid, start=start, ids=[], text=""))]
        return self.deliver(row)

    def deliver(self, row: Row) -> list[Action]:
        if row.client is None or row.blocked:
            return []
        if row.sent + 1 == len(row.outbox):  # the usual case, for every token of everybody
            row.sent += 1
            return [Reply(row.client, row.outbox[-1])]
        outbox, row.sent = row.outbox[row.sent :], len(row.outbox)
        return [Reply(row.client, message) for message in outbox]

    def undelivered(self, event: Undelivered) -> Row | None:
        """Take back what a client did not get. The row, when it can be tried again."""
        rid = getattr(event.message, "rid", None)
        row = self.table.rows.get(rid) if isinstance(rid, str) else None
        if row is None or row.blocked or row.client != event.client or event.message not in row.outbox:
            return None
        row.sent = min(row.sent, row.outbox.index(event.message))
        if event.gone:
            row.client = None
        row.blocked = not event.gone
        return row

    def detokenize(self, row: Row, *, final: bool) -> list[Action]:
        """Have the new tokens turned into text."""
        start, row.asked = row.asked, len(row.output)
        return [Detokenize(row.rid, start, tuple(row.output[start:]), tuple(row.sampling.stop), final)]

    def detokenized(self, row: Row, event: Detokenized) -> list[Action]:
        """Text is there. A stop text found ends the request: tokens past it do not count."""
        ids = list(event.ids)
        if event.counted is not None:
            del row.output[event.counted :]
            del ids[max(event.counted - event.start, 0) :]
            row.asked, row.reason = len(row.output), "stop"
        if ids or event.text:
            row.outbox.append(Delta(rid=row.rid, start=event.start, ids=ids, text=event.text))
        return self.deliver(row)

    def finish(self, row: Row, now: float) -> list[Action]:
        """Close the row: the Done is the last letter."""
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
        row.outbox.append(done)
        watchers = [Reply(client, done) for client in row.watchers]
        return [*self.deliver(row), *watchers, Release(row.rid)]


def _accepted(row: Row) -> Accepted:
    return Accepted(key=row.key, rid=row.rid, prompt_tokens=len(row.prompt))


def _before(message: Delta | Done, start: int) -> bool:
    """Whether a client that has `start` tokens has this letter. Its text may be split at a delta's end only;
    whether it has the text without tokens that may come last, the number of its tokens does not say."""
    return isinstance(message, Delta) and bool(message.ids) and message.start + len(message.ids) <= start


def refuse(client: bytes, key: str, why: str, retry_after_s: float | None = None) -> Reply:
    return Reply(client, Refused(key=key, reason=why, retry_after_s=retry_after_s))
