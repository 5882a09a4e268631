"""The client's state machine: which replies it has and which message it sends next. No socket and no clock: `now` is
the time of tetri/clock.py, in seconds.

A request repeats its message until it is answered: Submit until Accepted or Refused; then, after some silence, Attach
from the first missing token. Any single message may be lost, in either direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import Any, Generic, TypeVar, cast

from tetri.client.frames import RequestFailed, RequestRefused, Result, TetriError, Unreachable, frame, parse

DIFFERENT = "({} messages could not be decoded: are this client and the broker of the same version?)"


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
        self.listeners: list[Callable[[], None]] = []  # called when text arrives and when the call ends
        self._patience = patience
        self._unanswered: float | None = None  # when the current message was first sent
        self._next = now  # when to send it (again)

    @abstractmethod
    def question(self) -> bytes:
        """Return the frame to send."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return the keys and rids under which replies come to this call; "" stands for replies with neither."""

    @abstractmethod
    def receive(self, reply: dict[str, Any], now: float) -> bool:
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
        return self.question()

    def mark_alive(self, now: float) -> None:
        """Restart the timers: the broker has just answered."""
        self._unanswered = None
        self._next = now + self._patience.silence_s

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


class Request(Call[Result]):
    """One completion request. `key` and `secret` are those of the frame `submit`. `pieces` is the text that the caller
    has not read yet."""

    def __init__(self, key: str, secret: str, submit: bytes, patience: Patience, now: float) -> None:
        super().__init__(patience, now)
        self.key, self.secret = key, secret
        self.rid: str | None = None
        self.ids: list[int] = []
        self.pieces: deque[str] = deque()
        self._submit = submit
        self._text: list[str] = []
        self._tail_at = -1  # the token index at which text without tokens arrived
        self.cancelling = False
        self._asked_for = (-1, 0.0)  # the last missing token that was asked for, and when

    @property
    def lost(self) -> bool:
        return super().lost or (self.rid is not None and isinstance(self.error, RequestRefused))

    def question(self) -> bytes:
        if self.rid is None:
            return self._submit
        if self.cancelling:
            return self.cancellation()
        return frame({"type": "attach", "rid": self.rid, "secret": self.secret, "start": len(self.ids)})

    def names(self) -> tuple[str, ...]:
        return (self.key,) if self.rid is None else (self.key, self.rid)

    def cancellation(self) -> bytes:
        """Return the Cancel frame. Before the request is accepted, it names the key."""
        return frame({"type": "cancel", "rid": self.rid or self.key, "secret": self.secret})

    def cancel(self, sent: float | None = None) -> None:
        """Cancel the request; a session's by `Session.cancel`. Its result then has the reason "cancelled", unless it
        ended for another reason first. `sent`: when its `cancellation` was sent; None: at the next `tick`."""
        self.cancelling = True
        if self.rid is not None:
            self._next = -inf if sent is None else sent + self._patience.resend_s

    def receive(self, reply: dict[str, Any], now: float) -> bool:
        match reply["type"]:
            case "accepted":
                self._accept(reply, now)
            case "refused":
                self.end(RequestRefused(reply["reason"], reply["retry_after_s"]))
            case "delta":
                self._extend(reply, now)
            case "done":
                self._finish(reply, now)
        return True

    def mark_alive(self, now: float) -> None:
        """Restart the timers, as in `Call`. Only the end answers a Cancel: Deltas that still come do not delay it."""
        cancel_at = self._next
        super().mark_alive(now)
        if self.cancelling:
            self._next = cancel_at

    def _accept(self, reply: dict[str, Any], now: float) -> None:
        first = self.rid is None
        self.rid = self.rid or reply["rid"]
        self.mark_alive(now)
        if first and self.cancelling:
            self._next = now

    def _extend(self, delta: dict[str, Any], now: float) -> None:
        self.mark_alive(now)
        start, ids, known = delta["start"], delta["ids"], len(self.ids)
        if start + len(ids) < known or (start < known and start + len(ids) == known):
            return  # seen before
        if start != known:
            self._miss(now)  # a gap, or an overlap whose text cannot be separated from the text that is here
            return
        if not ids:  # text that the broker held back until the end
            if not delta["text"] or self._tail_at == known:
                return
            self._tail_at = known
        self.ids += ids
        if delta["text"]:
            self._text.append(delta["text"])
            self.pieces.append(delta["text"])
            self.notify()

    def _miss(self, now: float) -> None:
        """Ask for the next token at once, but for the same token only once in `resend_s`."""
        token, asked = self._asked_for
        if token != len(self.ids) or now - asked >= self._patience.resend_s:
            self._asked_for = (len(self.ids), now)
            self._next = now

    def _finish(self, done: dict[str, Any], now: float) -> None:
        self.mark_alive(now)
        if len(self.ids) < done["usage"].completion_tokens:
            self.cancelling = False  # the request has ended: only Attach brings the missing tokens
            self._miss(now)
            return
        self.answer = Result(
            rid=done["rid"],
            text="".join(self._text),
            token_ids=self.ids,
            finish_reason=done["reason"],
            usage=done["usage"],
            timeline=done["timeline"],
            ttft_s=done["ttft_s"],
            jct_s=done["jct_s"],
            receipt=done["receipt"],
        )
        why = done["error"] or "the request failed and the broker gave no reason"
        self.end(RequestFailed(why, self.answer) if done["reason"] == "error" else None)


class Session:
    """All open calls of one connection. `ignored` counts the frames that could not be decoded.

    A reply touches only the calls that it names, and only calls that are due are looked at: a client may have a
    thousand open requests."""

    def __init__(self) -> None:
        self.ignored = 0
        self._due: dict[Call[Any], float] = {}  # the open calls, each with the time of its entry in the heap
        self._heap: list[tuple[float, int, Call[Any]]] = []  # no entry is later than the deadline of its call
        self._serial = count()  # a signal handler may schedule, too
        self._named: dict[str, list[Call[Any]]] = {}
        self._cancelled: list[Request] = []  # since the last tick
        self.busy = False  # `tick` or `deadline` is running
        self._outbox: list[bytes] = []  # Cancels of requests that nobody waits for any more

    @property
    def open(self) -> int:
        """Number of open calls."""
        return len(self._due)

    def add(self, call: Call[Any]) -> None:
        """Add a call; the next `tick` returns its first message."""
        self._due[call] = inf
        self._index(call)
        self._schedule(call)

    def request(self, rid: str) -> Request | None:
        """Return the open request with this id, or None if it is not one of this session."""
        return next((call for call in self._named.get(rid, ()) if isinstance(call, Request)), None)

    def cancel(self, request: Request) -> None:
        """Cancel a request; the next `tick` returns the message, and the next `deadline` is at once. Signal handlers
        and other threads may call this and `abandon` at any time, but no other method while the session is `busy`."""
        request.cancel()
        self._cancelled.append(request)

    def abandon(self, request: Request, sent: float | None) -> None:
        """As `cancel`, for a request whose result nobody reads: also if its Accepted never comes. `sent`: when its
        `cancellation` was sent; None: it was not."""
        if sent is None and request.rid is None:
            self._outbox.append(request.cancellation())
        request.cancel(sent)
        self._cancelled.append(request)

    def cancels(self) -> list[bytes]:
        """Return the Cancels of all open requests, for a client that ends."""
        return [call.cancellation() for call in list(self._due) if isinstance(call, Request)]

    def receive(self, frames: list[bytes], now: float) -> None:
        """Handle one multipart message from the broker."""
        reply = parse(frames[0]) if len(frames) == 1 else None
        if reply is None:
            self.ignored += 1
            return
        for call in tuple(self._named.get(reply.get("key") or reply.get("rid") or "", ())):
            if call.receive(reply, now):
                self._received(call, reply)

    def tick(self, now: float) -> list[bytes]:
        """Return the frames to send now. Ends calls that have timed out."""
        self.busy = True
        try:
            asked = [question for call in self._pop_due(now) if (question := self._ask(call, now)) is not None]
        finally:  # an exception may come at any point: Ctrl-C raises one
            self.busy = False
        outbox, self._outbox = self._outbox, []
        return outbox + asked

    def deadline(self) -> float | None:
        """Return when to call `tick` next if no message arrives before; None without open calls."""
        self.busy = True
        try:
            when = self._next()
        finally:
            self.busy = False
        return 0.0 if self._cancelled else when

    def fail(self, error: TetriError) -> None:
        """End all calls with this error."""
        calls = list(self._due)
        for container in (self._due, self._named, self._heap, self._cancelled):
            container.clear()
        for call in calls:
            call.end(error)

    # ------------------------------------------------------------ calls by name

    def _index(self, call: Call[Any]) -> None:
        for name in call.names():
            calls = self._named.setdefault(name, [])
            if call not in calls:
                calls.append(call)

    def _received(self, call: Call[Any], reply: dict[str, Any]) -> None:
        if call.ended:
            self._close(call)
            return
        if reply["type"] == "accepted":
            self._index(call)  # under its rid, too
        self._schedule(call)

    def _close(self, call: Call[Any]) -> None:
        if self._due.pop(call, None) is None:
            return
        for name in call.names():
            calls = self._named[name]
            calls.remove(call)
            if not calls:
                del self._named[name]
        if isinstance(call, Request) and isinstance(call.error, Unreachable):
            self._outbox.append(call.cancellation())  # for a broker that wakes up and still has what was sent
        if self.ignored and call.lost:  # its answer may be one of the frames that could not be decoded
            assert call.error is not None
            call.error.args = (f"{call.error} {DIFFERENT.format(self.ignored)}",)

    # ------------------------------------------------------------ calls by deadline

    def _schedule(self, call: Call[Any]) -> None:
        """Note an earlier deadline. A later one is noticed when the entry in the heap comes first."""
        due = call.deadline()
        if due < self._due.get(call, -inf):
            self._due[call] = due
            heappush(self._heap, (due, next(self._serial), call))
            if len(self._heap) > 2 * len(self._due) + 64:  # most entries are of calls that have ended
                self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
                heapify(self._heap)

    def _next(self) -> float | None:
        """The earliest deadline; its call comes first in the heap."""
        heap, due = self._heap, self._due
        while heap:
            when, serial, call = heap[0]
            if due.get(call) != when:
                heappop(heap)
                continue
            later = call.deadline()
            if later <= when:
                return when
            due[call] = later
            heapreplace(heap, (later, serial, call))
        return None

    def _pop_due(self, now: float) -> list[Call[Any]]:
        """Remove the calls that are due from the heap and return them."""
        while self._cancelled:
            call = self._cancelled.pop()
            if call in self._due:
                self._due[call] = inf  # a new entry: an interrupted `tick` may have lost its own
                self._schedule(call)
        calls: list[Call[Any]] = []
        while (when := self._next()) is not None and when <= now:
            calls.append(heappop(self._heap)[2])
            self._due[calls[-1]] = inf
        return calls

    def _ask(self, call: Call[Any], now: float) -> bytes | None:
        question = call.tick(now)
        if call.ended:
            self._close(call)
        else:
            self._schedule(call)
        return question
