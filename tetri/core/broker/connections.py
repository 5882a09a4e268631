"""The connections of clients: which choices stream to each, which do not read, and which may have vanished.

A client that does not read is blocked as a whole: one message of all its choices is tried again, after longer and
longer pauses. Once a message gets through, its choices continue in order, a limited number of messages at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.core.actions import Action, Broken, Reply
from tetri.core.broker.requests import Choice, Request, Table
from tetri.core.timers import Timers
from tetri.wire.clients import Delta

BATCH = 64  # messages sent at a time from one choice or by one tick: a millisecond or two of the broker's loop
LONGEST_PAUSE_S = 2.0  # between two probes of a blocked client


@dataclass(slots=True)
class Connection:
    """One client. `choices`: those of its requests that are open, by id. `backlog`: those with unsent messages, ended
    ones too, in the order in which they continue. `sent_at`: when the last message was sent to it. `pause_s`: of the
    last probe."""

    sent_at: float
    choices: dict[str, Choice] = field(default_factory=dict)
    backlog: dict[str, Choice] = field(default_factory=dict)
    blocked: bool = False  # its queue is full: nothing is sent before the next probe
    probing: bool = False  # a probe was sent; it has arrived unless the client is blocked again by the next tick
    pause_s: float = 0.0


class Connections:
    """The connections that have open requests or unsent messages, by client. Times are in seconds.

    `retry_s`: the first pause before a blocked client is probed. `quiet_s`: a client with open requests to which
    nothing was sent for so long gets an empty Delta: sending is how the broker learns that a client is gone."""

    def __init__(self, retry_s: float, quiet_s: float) -> None:
        self._retry_s, self._quiet_s = retry_s, quiet_s
        self._connections: dict[bytes, Connection] = {}
        self._resume_at: Timers[bytes] = Timers()  # of blocked clients, and of those with a backlog
        self._quiet_at: Timers[bytes] = Timers()  # of clients with open requests

    # ------------------------------------------------------------ requests

    def stream(self, request: Request, client: bytes, now: float) -> None:
        """Let a request stream to this client, and no longer to the one before. Unsent messages are sent at the next
        tick, or at once those of a choice for which `attached` follows."""
        if request.client != client:
            self.leave(request)
        request.client = client
        connection = self._of(client, now)
        for choice in request.choices:
            if not choice.stage.ended:
                connection.choices[choice.id] = choice
            if choice.outbox.unsent:
                connection.backlog[choice.id] = choice
            else:
                connection.backlog.pop(choice.id, None)
        if connection.choices and client not in self._quiet_at:
            self._quiet_at.set(client, now + self._quiet_s)
        if connection.backlog and not connection.blocked:
            self._resume_at.set(client, now)

    def leave(self, request: Request) -> None:
        """Stop streaming a request to its client, if it has one."""
        connection = None if request.client is None else self._connections.get(request.client)
        if connection is not None:
            assert request.client is not None
            for choice in request.choices:
                connection.choices.pop(choice.id, None)
                connection.backlog.pop(choice.id, None)
            self._settle(request.client, connection)

    def ended(self, choice: Choice) -> None:
        """A choice has ended. Its unsent messages are still sent."""
        client = choice.request.client
        connection = None if client is None else self._connections.get(client)
        if connection is not None:
            assert client is not None
            connection.choices.pop(choice.id, None)
            self._settle(client, connection)

    def waits(self, request: Request) -> bool:
        """Whether a request has unsent messages for a connected client."""
        connection = None if request.client is None else self._connections.get(request.client)
        return connection is not None and any(choice.id in connection.backlog for choice in request.choices)

    # ------------------------------------------------------------ sending

    def deliver(self, choice: Choice, now: float) -> list[Action]:
        """Send the unsent messages of a choice, which has a new one, at most `BATCH` at once, unless its client is gone
        or blocked."""
        client = choice.request.client
        if client is None:
            return []
        connection = self._of(client, now)
        if choice.id in connection.backlog:
            return []
        if connection.blocked:
            connection.backlog[choice.id] = choice
            return []
        return self._send(choice, client, connection, BATCH, now)

    def attached(self, choice: Choice, start: int, now: float) -> list[Action]:
        """Answer an Attach of the request's client: the choice's unsent messages, or an empty Delta if there are none.
        A blocked client has probably read, since it asks: probe it at once."""
        client = choice.request.client
        assert client is not None
        connection = self._of(client, now)
        connection.backlog.pop(choice.id, None)
        most = BATCH
        if choice.outbox.unsent and connection.blocked:
            connection.blocked, connection.probing, most = False, True, 1
            self._resume_at.set(client, now)
        actions = self._send(choice, client, connection, most, now)
        self._settle(client, connection)
        return actions or [Reply(client, _empty(choice, start))]

    def _send(self, choice: Choice, client: bytes, connection: Connection, most: int, now: float) -> list[Action]:
        messages = choice.outbox.send_next(most)
        connection.sent_at = now
        if len(messages) == most and choice.outbox.unsent:
            connection.backlog[choice.id] = choice
            self._resume_at.set(client, now)
        elif not connection.choices:
            self._settle(client, connection)
        if len(messages) == 1:  # the usual case, fast
            return [Reply(client, messages[0])]
        return [Reply(client, message) for message in messages]

    # ------------------------------------------------------------ what did not arrive

    def full(self, choice: Choice, now: float) -> None:
        """A message of the choice, which is unsent again, did not fit into the queue of its client."""
        client = choice.request.client
        assert client is not None
        connection = self._of(client, now)
        connection.backlog[choice.id] = choice
        if not connection.blocked:
            connection.pause_s = min(2 * connection.pause_s, LONGEST_PAUSE_S) if connection.probing else self._retry_s
            connection.blocked, connection.probing = True, False
            self._resume_at.set(client, now + connection.pause_s)

    def gone(self, client: bytes) -> list[Request]:
        """A client has disconnected. Returns its open requests, which now have no client."""
        connection = self._connections.pop(client, None)
        if connection is None:
            return []
        self._resume_at.clear(client)
        self._quiet_at.clear(client)
        for choice in (connection.choices | connection.backlog).values():
            choice.request.client = None
        return [*dict.fromkeys(choice.request for choice in connection.choices.values())]

    # ------------------------------------------------------------ time

    def deadline(self) -> float | None:
        """When to call `tick` next; None if nothing is due."""
        resume, quiet = self._resume_at.next(), self._quiet_at.next()
        if resume is None or quiet is None:
            return quiet if resume is None else resume
        return min(resume, quiet)

    def tick(self, now: float) -> list[Action]:
        """Probe blocked clients, continue backlogs and send signs of life, about `BATCH` messages of each kind."""
        actions: list[Action] = []
        for timers, act in ((self._resume_at, self._resume), (self._quiet_at, self._sign)):
            most = len(actions) + BATCH
            for client in list(timers.due(now)):  # a list: what is set for `now` below is due at the next tick
                if len(actions) < most:
                    actions += act(client, self._connections[client], most - len(actions), now)
                else:
                    timers.set(client, now)
        return actions

    def _resume(self, client: bytes, connection: Connection, most: int, now: float) -> list[Action]:
        """Probe a blocked client, or continue the backlog of one that reads."""
        connection.probing = connection.blocked
        connection.blocked = False
        left = 1 if connection.probing else most
        actions: list[Action] = []
        while left > len(actions) and connection.backlog:
            name, choice = next(iter(connection.backlog.items()))
            del connection.backlog[name]
            actions += self._send(choice, client, connection, left - len(actions), now)
        if connection.probing or connection.backlog:
            self._resume_at.set(client, now)
        else:
            self._settle(client, connection)
        return actions

    def _sign(self, client: bytes, connection: Connection, most: int, now: float) -> list[Action]:
        """Send a quiet client an empty Delta of one of its open choices, of each in turn."""
        if connection.backlog or now < connection.sent_at + self._quiet_s:
            later = now if connection.backlog else connection.sent_at
            self._quiet_at.set(client, later + self._quiet_s)
            return []
        self._quiet_at.set(client, now + self._quiet_s)
        connection.sent_at = now
        name, choice = next(iter(connection.choices.items()))
        del connection.choices[name]
        connection.choices[name] = choice
        return [Reply(client, _empty(choice, choice.outbox.tokens_sent))]

    # ------------------------------------------------------------ upkeep

    def _of(self, client: bytes, now: float) -> Connection:
        connection = self._connections.get(client)
        if connection is None:
            connection = self._connections[client] = Connection(now)
        return connection

    def _settle(self, client: bytes, connection: Connection) -> None:
        """Clear the timers that have no purpose any more, and forget a connection without requests."""
        waits = connection.backlog or connection.probing
        if not (waits or (connection.blocked and connection.choices)):
            self._resume_at.clear(client)
        if not connection.choices:
            self._quiet_at.clear(client)
            if not waits:
                self._connections.pop(client, None)

    def check(self, table: Table) -> None:
        """Compare the connections with the request table. Raises Broken."""
        for client, connection in self._connections.items():
            if not (connection.choices or connection.backlog or connection.probing):
                raise Broken(f"the connection of client {client!r} has no purpose")
            waits = bool(connection.blocked or connection.probing or connection.backlog)
            if waits != (client in self._resume_at) or bool(connection.choices) != (client in self._quiet_at):
                raise Broken(f"client {client!r} has a timer too many or too few")
        listed = {name: client for client, each in self._connections.items() for name in each.choices}
        waiting = {name: client for client, each in self._connections.items() for name in each.backlog}
        choices = [choice for choice in table.choices.values() if choice.request.client is not None]
        if listed != {choice.id: choice.request.client for choice in choices if not choice.stage.ended}:
            raise Broken("the open choices by client are out of date")
        if waiting != {choice.id: choice.request.client for choice in choices if choice.outbox.unsent}:
            raise Broken("the unsent choices by client are out of date")


def _empty(choice: Choice, start: int) -> Delta:
    """A Delta without anything new."""
    return Delta(rid=choice.request.rid, start=start, ids=[], text="", choice=choice.index)
