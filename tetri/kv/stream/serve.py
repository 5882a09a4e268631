"""The fetches that peers requested from this worker's slab over `stream`, and which piece is sent next. Pure: no
sockets, no clock.

Peers take turns piece by piece, and so do the lanes of a peer (one lane for each request). The fetches of a lane run
one after the other. So a large transfer delays a small one by one piece of each other lane, and a peer that grants no
credit delays no other.

The server keeps a piece's slots (`Slab.keep`) from before it checks their generations until libzmq has released the
bytes, so the bytes cannot change during the send. Each piece keeps its own slots, in the generation of the fetch's
handle. So all pieces that arrive belong to the handle's chunk, also when a fetch resumes over another connection; and
a fetch that waits for credit blocks no slot from reuse.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tetri.wire.bulk import PIECE_BYTES, BulkRequest, Credit, Fetch, Gone, cost
from tetri.wire.handover import Handle

SMALL_BLOCK = 64 << 10  # bytes: smaller blocks are copied into one piece, as a frame for each would cost more
MAX_PEERS = 1024
MAX_FETCHES = 1024  # from one peer


@dataclass(slots=True)
class _Asked:
    number: int
    handle: Handle
    at: int  # bytes sent, of the blocks in order
    size: int  # bytes of all blocks


@dataclass(slots=True)
class _Peer:
    credit: int = 0
    sent: int = 0  # cost of all its pieces so far
    lanes: dict[int, deque[_Asked]] = field(default_factory=dict)  # in the order of their turns
    fetches: int = 0
    waits: bool = False  # is in the queue for a turn


@dataclass(frozen=True, slots=True)
class Due:
    """The next piece to send: bytes [start, stop) of the blocks in order. `slots`: a handle of the slots it touches."""

    peer: bytes
    number: int
    start: int
    stop: int
    slots: Handle


class Serving:
    """All fetches from one slab. `problem(handle)`: why a handle does not fit the slab, None when it fits."""

    def __init__(self, problem: Callable[[Handle], str | None]) -> None:
        self._problem = problem
        self._peers: dict[bytes, _Peer] = {}
        self._turns: deque[bytes] = deque()

    @property
    def peers(self) -> list[bytes]:
        """The connections with fetches or credit."""
        return list(self._peers)

    @property
    def fetches(self) -> int:
        """How many fetches are unfinished."""
        return sum(peer.fetches for peer in self._peers.values())

    def received(self, name: bytes, message: BulkRequest) -> Gone | None:
        """Handle a message of the connection `name`; returns the answer if a fetch is refused."""
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                return _gone(message.number, "too many receivers at once") if isinstance(message, Fetch) else None
            peer = self._peers[name] = _Peer()
        peer.credit = max(peer.credit, message.credit)
        answer = None if isinstance(message, Credit) else self._asked(peer, message)
        self._queue(name, peer)
        return answer

    def _asked(self, peer: _Peer, fetch: Fetch) -> Gone | None:
        problem = self._problem(fetch.handle)
        if problem is not None:
            return Gone(number=fetch.number, foreign=True, reason=problem[:300])
        size = len(fetch.handle.slots) * fetch.handle.block_bytes
        if fetch.start > size or (size and fetch.start == size):
            return _gone(fetch.number, f"{size} bytes, of which nothing is left at {fetch.start}")
        if peer.fetches >= MAX_FETCHES:
            return _gone(fetch.number, f"more than {MAX_FETCHES} fetches at once")
        peer.fetches += 1
        peer.lanes.setdefault(fetch.lane, deque()).append(_Asked(fetch.number, fetch.handle, fetch.start, size))
        return None

    def _queue(self, name: bytes, peer: _Peer) -> None:
        if peer.lanes and not peer.waits:
            peer.waits = True
            self._turns.append(name)

    def next(self) -> Due | None:
        """The next piece to send; report the result with `sent`, `gone`, `full` or `forget`. None: nothing can be sent
        before another message arrives."""
        while self._turns:
            name = self._turns[0]
            peer = self._peers[name]
            asked = next(iter(peer.lanes.values()))[0] if peer.lanes else None
            if asked is not None:
                stop = cut(asked.handle, asked.at)
                if peer.sent + cost(stop - asked.at) <= peer.credit:
                    return Due(name, asked.number, asked.at, stop, _touched(asked.handle, asked.at, stop))
            self.full(name)
        return None

    def sent(self, due: Due) -> None:
        """The piece was sent: the next peer and lane have their turn."""
        peer = self._peers[due.peer]
        peer.sent += cost(due.stop - due.start)
        lane, fetches = next(iter(peer.lanes.items()))
        fetches[0].at = due.stop
        del peer.lanes[lane]
        if due.stop == fetches[0].size:
            fetches.popleft()
            peer.fetches -= 1
        if fetches:
            peer.lanes[lane] = fetches  # behind the others
        self._turns.rotate(-1)

    def gone(self, due: Due) -> Gone:
        """The slots no longer hold the handle's chunk: the fetch ends. Returns the answer."""
        peer = self._peers[due.peer]
        lane, fetches = next(iter(peer.lanes.items()))
        fetches.popleft()
        peer.fetches -= 1
        if not fetches:
            del peer.lanes[lane]
        return _gone(due.number, "the slots were freed")

    def full(self, name: bytes) -> None:
        """Send nothing more to this peer until its next message."""
        self._turns.remove(name)
        self._peers[name].waits = False

    def forget(self, name: bytes) -> None:
        """The connection is gone: drop its fetches."""
        peer = self._peers.pop(name, None)
        if peer is not None and peer.waits:
            self._turns.remove(name)


def cut(handle: Handle, at: int) -> int:
    """Where the piece that starts at byte `at` of the blocks in order stops: after at most 1 MB, and at the end of
    adjacent slots, so that it is sent without a copy. Small blocks are joined instead."""
    size, slots = handle.block_bytes, handle.slots
    most = min(at + PIECE_BYTES, len(slots) * size)
    if size < SMALL_BLOCK:
        return most
    index = at // size
    while (index + 1) * size < most and slots[index + 1] == slots[index] + 1:
        index += 1
    return min(most, (index + 1) * size)


def spans(handle: Handle, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where bytes [start, stop) of the blocks in order lie: (offset in the slab, bytes); adjacent spans are merged."""
    size = handle.block_bytes
    first = length = 0
    while start < stop:
        index, inside = divmod(start, size)
        offset = handle.slots[index] * size + inside
        part = min(size - inside, stop - start)
        if length and first + length == offset:
            length += part
        else:
            if length:
                yield first, length
            first, length = offset, part
        start += part
    if length:
        yield first, length


def _touched(handle: Handle, start: int, stop: int) -> Handle:
    size = handle.block_bytes
    first, last = (start // size, -(-stop // size)) if stop > start else (0, 0)
    return handle.part(first, last)


def _gone(number: int, reason: str) -> Gone:
    return Gone(number=number, foreign=False, reason=reason)
