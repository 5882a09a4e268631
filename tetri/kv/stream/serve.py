"""What others have asked of the own slab over `stream`, and which piece goes next. Pure: no sockets, no clock.

Peers take turns, and in each peer its lanes (one a request), piece by piece; a lane's fetches go one after the other.
So a large transfer delays a small one by one piece of each other lane, and a peer that grants no credit delays nobody.

A piece's slots are kept (`Slab.keep`) from before its generations are read until libzmq has let go of its bytes, so
what is sent cannot change under the send; the next piece keeps its own slots again, in the generation that the fetch
names. All pieces of a chunk that arrive are therefore of what the handle says, also when a fetch goes on over another
connection, and a fetch that waits for credit keeps nothing from being used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tetri.wire.bulk import PIECE_BYTES, BulkRequest, Credit, Fetch, Gone, cost
from tetri.wire.handover import Handle

SMALL_BLOCK = 64 << 10  # blocks below it are copied together into one piece: a frame each would cost more
MAX_PEERS = 1024
MAX_FETCHES = 1024  # of one peer


@dataclass(slots=True)
class _Asked:
    number: int
    handle: Handle
    at: int  # bytes, of the blocks in order
    size: int


@dataclass(slots=True)
class _Peer:
    credit: int = 0
    sent: int = 0  # what all its pieces cost
    lanes: dict[int, deque[_Asked]] = field(default_factory=dict)  # the next one's turn first
    fetches: int = 0
    waits: bool = False  # in the queue of those who have a turn


@dataclass(frozen=True, slots=True)
class Due:
    """A piece to be sent: bytes `start` to `stop` of the blocks in order; `slots` are those that it touches."""

    peer: bytes
    number: int
    start: int
    stop: int
    slots: Handle


class Serving:
    """`problem` says why a handle cannot be of this slab, None when it can."""

    def __init__(self, problem: Callable[[Handle], str | None]) -> None:
        self._problem = problem
        self._peers: dict[bytes, _Peer] = {}
        self._turns: deque[bytes] = deque()

    @property
    def peers(self) -> list[bytes]:
        return list(self._peers)

    @property
    def fetches(self) -> int:
        return sum(peer.fetches for peer in self._peers.values())

    def received(self, name: bytes, message: BulkRequest) -> Gone | None:
        """A message of the connection `name`; what to answer at once."""
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
        """Whose turn it is: the piece to send, to be followed by `sent`, `gone`, `full` or `forget`. None: nothing can
        be sent before somebody is heard."""
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
        """The slots are not kept any more for what the handle says: the fetch ends; the answer."""
        peer = self._peers[due.peer]
        lane, fetches = next(iter(peer.lanes.items()))
        fetches.popleft()
        peer.fetches -= 1
        if not fetches:
            del peer.lanes[lane]
        return _gone(due.number, "the slots were freed")

    def full(self, name: bytes) -> None:
        """Nothing more goes to this peer until it is heard."""
        self._turns.remove(name)
        self._peers[name].waits = False

    def forget(self, name: bytes) -> None:
        """The connection is no more."""
        peer = self._peers.pop(name, None)
        if peer is not None and peer.waits:
            self._turns.remove(name)


def cut(handle: Handle, at: int) -> int:
    """Where a piece that starts at byte `at` of the blocks in order stops: at 1 MB at the latest, and before the next
    hole in memory, so that it can be sent as it lies there. Small blocks are joined instead."""
    size, slots = handle.block_bytes, handle.slots
    most = min(at + PIECE_BYTES, len(slots) * size)
    if size < SMALL_BLOCK:
        return most
    index = at // size
    while (index + 1) * size < most and slots[index + 1] == slots[index] + 1:
        index += 1
    return min(most, (index + 1) * size)


def spans(handle: Handle, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(offset in the slab, bytes) of what lies at `start` to `stop` of the blocks in order; neighbours as one."""
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
    return Handle(
        segment=handle.segment,
        slots=handle.slots[first:last],
        generations=handle.generations[first:last],
        block_bytes=size,
    )


def _gone(number: int, reason: str) -> Gone:
    return Gone(number=number, foreign=False, reason=reason)
