"""The client's state machine: which replies it has and which message it sends next. No socket and no clock: `now` is
the time of tetri/clock.py, in seconds.

A request repeats its message until it is answered: Submit until Accepted or Refused; then, after some silence of a
choice, Attach from its first missing token. Any single message may be lost, in either direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Generic, TypeVar, cast

from tetri.client.frames import (
    Event,
    RequestFailed,
    RequestLost,
    RequestRefused,
    Result,
    TetriError,
    Unreachable,
    frame,
)
from tetri.request import Token, TokenLogprob, token_ids
from tetri.wire.clients import Accepted, Attach, BrokerReply, Cancel, Delta, Done, Refused


@dataclass(frozen=True, slots=True)
class Patience:
    """Timeouts in seconds. `timeout`: how long a message may stay unanswered; `silence_s`: how long the client waits
    for the next message before it asks the broker; `resend_s`: the interval at which a message is repeated."""

    timeout: float = 30.0
    silence_s: float = 2.0
    resend_s: float = 1.0


A = TypeVar("A")


class Call(ABC, Generic[A]):
    """One message that is repeated until it is answered. When `ended` is true, `answer` or `error` is set."""

    doubt = "is it up?"  # ends the error line when no answer arrives

    def __init__(self, patience: Patience, now: float) -> None:
        self.ended = False
        self.answer: A | None = None
        self.error: TetriError | None = None
        self.listeners: list[Callable[[], None]] = []  # called when output arrives and when the call ends
        self._patience = patience
        self._unanswered: float | None = None  # when the current message was first sent
        self._next = now  # when to send it (again)

    @abstractmethod
    def question(self, now: float) -> bytes:
        """Return the frame to send."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return the keys and rids under which replies come to this call; "" stands for replies with neither."""

    @abstractmethod
    def receive(self, reply: BrokerReply, now: float) -> bool:
        """Handle a reply with one of `names`; return whether it belongs to this call."""

    def deadline(self) -> float:
        """Return when to call `tick` next."""
        given_up = self._next if self._unanswered is None else self._unanswered + self._patience.timeout
        return min(self._next, given_up)

    def tick(self, now: float) -> bytes | None:
        """Return the frame if it is time to send it. Ends the call with Unreachable after the timeout."""
        if self._unanswered is not None and now - self._unanswered >= self._patience.timeout:
            self.end(Unreachable(f"no answer from the broker for {self._patience.timeout:g} s: {self.doubt}"))
        if self.ended or now < self._next:
            return None
        if self._unanswered is None:
            self._unanswered = now
        self._next = now + self._patience.resend_s
        return self.question(now)

    @property
    def lost(self) -> bool:
        """Whether the call ended although the broker should have answered it."""
        return isinstance(self.error, Unreachable)

    def end(self, error: TetriError | None = None) -> None:
        """End the call, with this error if there is one. Does nothing if it has ended."""
        if not self.ended:
            self.ended, self.error = True, error
            self.notify()

    def outcome(self) -> A:
        """Return the answer of a call that has ended. Raises its error."""
        if self.error is not None:
            raise self.error
        return cast(A, self.answer)

    def notify(self) -> None:
        """Call all listeners."""
        for listener in self.listeners:
            listener()


class Choice:
    """One output of a request, a stream of its own. `tokens` and `texts`: what has arrived. `ask_at`: when to ask for
    the rest. `over`: its Done has arrived. `result`: set once all its tokens have, too."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[Token] = []
        self.texts: list[str] = []
        self.ask_at = inf
        self.over = False
        self.result: Result | None = None
        self._tokens_read = self._texts_read = 0
        self._tail_at = -1  # the token index at which text without tokens arrived
        self._asked_for = (-1, 0.0)  # the last missing token that was asked for, and when

    def lacks(self, delta: Delta) -> bool:
        """Whether there is a gap before this Delta, or an overlap whose text cannot be separated from the text here."""
        known = len(self.tokens)
        return delta.start > known or delta.start < known < delta.start + len(delta.ids)

    def miss(self, now: float, resend_s: float) -> None:
        """Ask for the next token at once, but for the same token only once in `resend_s`."""
        token, asked = self._asked_for
        if token != len(self.tokens) or now - asked >= resend_s:
            self._asked_for = (len(self.tokens), now)
            self.ask_at = now

    def extend(self, delta: Delta) -> bool:
        """Append a Delta that this choice `lacks` nothing for; return whether it has anything new."""
        if delta.start != len(self.tokens):
            return False  # seen before
        if not delta.ids:  # text that the broker held back until the end
            if not delta.text or self._tail_at == delta.start:
                return False
            self._tail_at = delta.start
        self.tokens += delta.ids
        if delta.text:
            self.texts.append(delta.text)
        return True

    def has_text(self) -> bool:
        """Whether `text` has a piece to return."""
        return self._texts_read < len(self.texts)

    def text(self) -> str:
        """Return the next piece of text that the caller has not read."""
        self._texts_read += 1
        return self.texts[self._texts_read - 1]

    def event(self) -> Event:
        """Return all that the caller has not read as one event."""
        tokens, text = tuple(self.tokens[self._tokens_read :]), "".join(self.texts[self._texts_read :])
        self._tokens_read, self._texts_read = len(self.tokens), len(self.texts)
        return Event(self.index, text, tokens, self.result)

    def finished(self, done: Done) -> Result:
        """Return the result of a choice that has all its tokens."""
        plain = not self.tokens or isinstance(self.tokens[0], int)
        return Result(
            rid=done.rid,
            text="".join(self.texts),
            token_ids=cast(list[int], self.tokens) if plain else token_ids(self.tokens),
            finish_reason=done.reason,
            usage=done.usage,
            timeline=done.timeline,
            ttft_s=done.ttft_s,
            jct_s=done.jct_s,
            receipt=done.receipt,
            choice=self.index,
            slo=done.slo,
            slo_result=done.slo_result,
            logprobs=None if plain else cast(list[TokenLogprob], self.tokens),
        )


class Request(Call[Result]):
    """One completion request of `n` choices; it ends when all have ended, or when one fails. `key` and `secret` are
    those of the frame `submit`."""

    def __init__(self, key: str, secret: str, submit: bytes, patience: Patience, now: float, n: int = 1) -> None:
        super().__init__(patience, now)
        self.key, self.secret = key, secret
        self.rid: str | None = None
        self.prompt_tokens = 0  # known once the broker has accepted it
        self.choices = [Choice(index) for index in range(n)]
        self.open = self.choices.copy()  # without a result
        self.cancelling = False
        self._submit = submit
        self._cancel_at = inf  # when to send a Cancel (again)
        self._unread: deque[Choice] = deque()  # those with output that the caller has not read

    @property
    def lost(self) -> bool:
        return super().lost or isinstance(self.error, RequestLost)

    @property
    def left_behind(self) -> bool:
        """Whether the request ended here, although the broker may still compute it."""
        return isinstance(self.error, Unreachable) or (isinstance(self.error, RequestFailed) and bool(self.open))

    def has_event(self) -> bool:
        """Whether `event` has something to return."""
        return bool(self._unread)

    def event(self) -> Event:
        """Return what is new of the choice that has waited longest."""
        return self._unread.popleft().event()

    def question(self, now: float) -> bytes:
        again = now + self._patience.resend_s
        if self.rid is None:
            return self._submit
        if self._cancel_at <= now:
            self._cancel_at, asked = again, self.cancellation()
        else:
            choice = min(self.open, key=lambda choice: choice.ask_at)
            choice.ask_at, start = again, len(choice.tokens)
            asked = frame(Attach(rid=self.rid, secret=self.secret, start=start, choice=choice.index))
        self._plan()
        return asked

    def names(self) -> tuple[str, ...]:
        return (self.key,) if self.rid is None else (self.key, self.rid)

    def cancellation(self) -> bytes:
        """Return the Cancel frame. Before the request is accepted, it names the key."""
        return frame(Cancel(rid=self.rid or self.key, secret=self.secret))

    def cancel(self, sent: float | None = None) -> None:
        """Cancel the request; a session's by `Session.cancel`. Its result then has the reason "cancelled", unless it
        ended for another reason first. `sent`: when its `cancellation` was sent; None: at the next `tick`."""
        self.cancelling = True
        if self.rid is not None and not self.ended:
            self._await_cancelled(-inf if sent is None else sent + self._patience.resend_s)

    def receive(self, reply: BrokerReply, now: float) -> bool:
        match reply:
            case Delta():
                self._extend(reply, now)
            case Done():
                self._finish(reply, now)
            case Accepted():
                self._accept(reply, now)
            case Refused():
                kind = RequestRefused if self.rid is None else RequestLost
                self.end(kind(reply.reason, reply.retry_after_s))
        return True

    def _accept(self, reply: Accepted, now: float) -> None:
        self._unanswered = None
        if self.rid is None:
            self.rid, self.prompt_tokens = reply.rid, reply.prompt_tokens
            for choice in self.choices:
                choice.ask_at = now + self._patience.silence_s
            self._plan()
            if self.cancelling:
                self._await_cancelled(now)

    def _extend(self, delta: Delta, now: float) -> None:
        choice = self._alive(delta, now)
        if choice is None:
            return
        if choice.lacks(delta):
            if not self.cancelling:
                choice.miss(now, self._patience.resend_s)
        elif choice.extend(delta):
            self._show(choice)
        self._plan()

    def _finish(self, done: Done, now: float) -> None:
        choice = self._alive(done, now)
        if choice is None:
            return
        if all(each.over for each in self.open):
            self._cancel_at = inf  # answered
        if len(choice.tokens) < done.usage.completion_tokens:
            choice.miss(now, self._patience.resend_s)
            self._plan()
            return
        self.open.remove(choice)
        result = choice.finished(done)
        if done.reason == "error":
            self.end(RequestFailed(done.error or "the request failed and the broker gave no reason", result))
            return
        choice.result = result
        self._show(choice)
        if self.open:
            self._plan()
        else:
            first, *others = (cast(Result, each.result) for each in self.choices)
            self.answer = replace(first, others=tuple(others)) if others else first
            self.end()

    def _alive(self, reply: Delta | Done, now: float) -> Choice | None:
        """Return the choice of a reply and restart its timer; None if it has ended. Only its end answers a Cancel:
        Deltas that still come do not delay it."""
        self._unanswered = None
        choice = self.choices[reply.choice] if reply.choice < len(self.choices) else None
        if choice is None or choice.result is not None:
            return None
        choice.over = choice.over or isinstance(reply, Done)
        if choice.over or not self.cancelling:
            choice.ask_at = now + self._patience.silence_s
        return choice

    def _await_cancelled(self, cancel_at: float) -> None:
        self._cancel_at = cancel_at
        for choice in self.open:
            if not choice.over:
                choice.ask_at = inf
        self._plan()

    def _plan(self) -> None:
        self._next = min(self._cancel_at, *[choice.ask_at for choice in self.open])

    def _show(self, choice: Choice) -> None:
        """Let the caller know that there is something to read."""
        if choice not in self._unread:
            self._unread.append(choice)
        self.notify()
