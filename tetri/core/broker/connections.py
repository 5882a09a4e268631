"""The connections of clients: which requests stream to each, which do not read, and which may have vanished.

A client that does not read is blocked as a whole: one message of all its requests is tried again, after longer and
longer pauses. Once a message gets through, its requests continue in order, a limited number of messages at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.core.actions import Action, Broken, Reply
from tetri.core.broker.requests import Row, Table
from tetri.core.timers import Timers
from tetri.wire.clients import Delta

BATCH = 64  # messages sent at a time from one request or by one tick: a millisecond or two of the broker's loop
LONGEST_PAUSE_S = 2.0  # between two probes of a blocked client


@dataclass(slots=True)
class Connection:
    """One client. `rows`: its open requests by rid. `backlog`: its requests with unsent messages, ended ones too, in
    the order in which they continue. `sent_at`: when the last message was sent to it. `pause_s`: of the last probe."""

    sent_at: float
    rows: dict[str, Row] = field(default_factory=dict)
    backlog: dict[str, Row] = field(default_factory=dict)
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

    def stream(self, row: Row, client: bytes, now: float) -> None:
        """Let a request stream to this client, and no longer to the one before. `attached` or `deliver` follows."""
        if row.client != client:
            self.leave(row)
        row.client = client
        connection = self._of(client, now)
        connection.backlog.pop(row.rid, None)
        if not row.stage.ended:
            connection.rows[row.rid] = row
            if client not in self._quiet_at:
                self._quiet_at.set(client, now + self._quiet_s)

    def leave(self, row: Row) -> None:
        """Stop streaming a request to its client, if it has one."""
        connection = None if row.client is None else self._connections.get(row.client)
        if connection is not None:
            assert row.client is not None
            connection.rows.pop(row.rid, None)
            connection.backlog.pop(row.rid, None)
            self._settle(row.client, connection)

    def ended(self, row: Row) -> None:
        """A request has ended. Its unsent messages are still sent."""
        connection = None if row.client is None else self._connections.get(row.client)
        if connection is not None:
            assert row.client is not None
            connection.rows.pop(row.rid, None)
            self._settle(row.client, connection)

    def waits(self, row: Row) -> bool:
        """Whether a request has unsent messages for a connected client."""
        connection = None if row.client is None else self._connections.get(row.client)
        return connection is not None and row.rid in connection.backlog

    # ------------------------------------------------------------ sending

    def deliver(self, row: Row, now: float) -> list[Action]:
        """Send the unsent messages of a request, at most `BATCH` at once, unless its client is gone or blocked."""
        client = row.client
        if client is None or not row.outbox.unsent:
            return []
        connection = self._of(client, now)
        if row.rid in connection.backlog:
            return []
        if connection.blocked:
            connection.backlog[row.rid] = row
            return []
        return self._send(row, client, connection, BATCH, now)

    def attached(self, row: Row, start: int, now: float) -> list[Action]:
        """Answer an Attach of the request's client: its unsent messages, or an empty Delta if there are none. A
        blocked client has probably read, since it asks: probe it at once."""
        client = row.client
        assert client is not None
        connection = self._of(client, now)
        if not row.outbox.unsent:
            connection.sent_at = now
            self._settle(client, connection)
            return [Reply(client, Delta(rid=row.rid, start=start, ids=[], text=""))]
        if not connection.blocked:
            return self.deliver(row, now)
        connection.blocked, connection.probing = False, True
        self._resume_at.set(client, now)
        return self._send(row, client, connection, 1, now)

    def _send(self, row: Row, client: bytes, connection: Connection, most: int, now: float) -> list[Action]:
        messages = row.outbox.send_next(most)
        connection.sent_at = now
        if len(messages) == most and row.outbox.unsent:
            connection.backlog[row.rid] = row
            self._resume_at.set(client, now)
        elif not connection.rows:
            self._settle(client, connection)
        return [Reply(client, message) for message in messages]

    # ------------------------------------------------------------ what did not arrive

    def full(self, row: Row, now: float) -> None:
        """A message of the request, which is unsent again, did not fit into the queue of its client."""
        client = row.client
        assert client is not None
        connection = self._of(client, now)
        connection.backlog[row.rid] = row
        if not connection.blocked:
            connection.pause_s = min(2 * connection.pause_s, LONGEST_PAUSE_S) if connection.probing else self._retry_s
            connection.blocked, connection.probing = True, False
            self._resume_at.set(client, now + connection.pause_s)

    def gone(self, client: bytes) -> list[Row]:
        """A client has disconnected. Returns its open requests, which now have no client."""
        connection = self._connections.pop(client, None)
        if connection is None:
            return []
        self._resume_at.clear(client)
        self._quiet_at.clear(client)
        for row in (connection.rows | connection.backlog).values():
            row.client = None
        return [*connection.rows.values()]

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
            rid, row = next(iter(connection.backlog.items()))
            del connection.backlog[rid]
            actions += self._send(row, client, connection, left - len(actions), now)
        if connection.probing or connection.backlog:
            self._resume_at.set(client, now)
        else:
            self._settle(client, connection)
        return actions

    def _sign(self, client: bytes, connection: Connection, most: int, now: float) -> list[Action]:
        """Send a quiet client an empty Delta of one of its requests, of each in turn."""
        if connection.backlog or now < connection.sent_at + self._quiet_s:
            later = now if connection.backlog else connection.sent_at
            self._quiet_at.set(client, later + self._quiet_s)
            return []
        self._quiet_at.set(client, now + self._quiet_s)
        connection.sent_at = now
        rid, row = next(iter(connection.rows.items()))
        del connection.rows[rid]
        connection.rows[rid] = row
        return [Reply(client, Delta(rid=rid, start=row.outbox.tokens_sent, ids=[], text=""))]

    # ------------------------------------------------------------ upkeep

    def _of(self, client: bytes, now: float) -> Connection:
        connection = self._connections.get(client)
        if connection is None:
            connection = self._connections[client] = Connection(now)
        return connection

    def _settle(self, client: bytes, connection: Connection) -> None:
        """Clear the timers that have no purpose any more, and forget a connection without requests."""
        if connection.rows:
            return
        self._quiet_at.clear(client)
        if not connection.backlog and not connection.probing:
            self._resume_at.clear(client)
            self._connections.pop(client, None)

    def check(self, table: Table) -> None:
        """Compare the connections with the request table. Raises Broken."""
        for client, connection in self._connections.items():
            if not (connection.rows or connection.backlog or connection.probing):
                raise Broken(f"the connection of client {client!r} has no purpose")
            waits = bool(connection.blocked or connection.probing or connection.backlog)
            if waits != (client in self._resume_at) or bool(connection.rows) != (client in self._quiet_at):
                raise Broken(f"client {client!r} has a timer too many or too few")
        listed = {rid: client for client, each in self._connections.items() for rid in each.rows}
        waiting = {rid: client for client, each in self._connections.items() for rid in each.backlog}
        rows = [row for row in table.rows.values() if row.client is not None]
        if listed != {row.rid: row.client for row in rows if not row.stage.ended}:
            raise Broken("the open requests by client are out of date")
        if waiting != {row.rid: row.client for row in rows if row.outbox.unsent}:
            raise Broken("the unsent requests by client are out of date")
