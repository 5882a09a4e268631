"""The open calls of one connection: whom a reply touches and when each is due. No socket and no clock, as in
`conversation`."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import Any

from tetri.client.conversation import Call, Request
from tetri.client.frames import TetriError, parse
from tetri.request import choice_id
from tetri.wire.clients import Accepted, BrokerReply, Delta, Done, Observation, Readiness, Status
from tetri.wire.observation import Timeline

DIFFERENT = "({} messages could not be decoded: are this client and the broker of the same version?)"


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
        for call in tuple(self._named.get(_name(reply), ())):
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

    def _received(self, call: Call[Any], reply: BrokerReply) -> None:
        if call.ended:
            self._close(call)
            return
        if isinstance(reply, Accepted):
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
        if isinstance(call, Request) and call.left_behind:
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


def _name(reply: BrokerReply) -> str:
    if isinstance(reply, Delta | Done):
        return reply.rid
    if isinstance(reply, Timeline):
        return choice_id(reply.rid, reply.choice)
    return "" if isinstance(reply, Status | Readiness | Observation) else reply.key
