"""What a receiver has asked of its peers over `stream`, and what it may ask next. Pure: no sockets, `now` comes in.

Memory: a take starts when its bytes fit beside those of all that have started and are not yet used by the engine; a
take larger than all of `buffer` starts alone. Requests take turns in starting, so that one with many chunks waiting
does not keep the chunk of another from its memory; the chunks of one request start in order, and its peer sends them
in order.

Credit: a connection may have `credit` bytes of pieces under way. Every piece is taken out of its connection when it
comes, so the credit is topped up whatever the engine does: memory bounds what is started, credit what is under way.

A connection that breaks, or brings nothing for `stall_s`, is made anew, and what was asked goes on behind the bytes
that are here: the server looks at the slots' generations again, and the digest is over all of it. When a peer brings
nothing for `lost_s`, all that is asked of it is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from xxhash import xxh3_64

from tetri.kv.base import Block, KVCorrupt, KVError, KVForeign, KVLost, Wanted
from tetri.wire.bulk import MAX_SLOTS, Credit, Fetch, Gone, cost
from tetri.wire.handover import Handle

MAX_STARTED = 256  # of one peer
_NEVER = float("inf")
_PASSED_OVER = 4  # times lost_s
_SHORT = 64 << 10  # a piece of fewer bytes is copied: small frames share libzmq's buffers, and each has its overhead
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class StreamPatience:
    stall_s: float = 5.0  # with a piece of 1 MB at least so often, a connection is alive
    lost_s: float = 15.0


class ChunkFetch:
    """One chunk on its way: `at` bytes of `size` are here."""

    def __init__(self, wanted: Wanted, number: int, lane: int) -> None:
        self.wanted, self.number, self.lane = wanted, number, lane
        self.size = len(wanted.handle.slots) * wanted.handle.block_bytes
        self.at = 0
        self.started = False
        self.clock = 0.0  # since when it has brought nothing
        self._parts: list[memoryview | bytearray] = []  # what is here, in order
        self._digest = None if wanted.digest is None else xxh3_64()

    def add(self, piece: memoryview) -> None:
        """The next bytes, in memory that is the take's from now on."""
        self.at += len(piece)
        if self._digest is not None:
            self._digest.update(piece)
        if len(piece) >= _SHORT:
            self._parts.append(piece)
            return
        last = self._parts[-1] if self._parts else None
        if isinstance(last, bytearray):
            last += piece
        else:
            self._parts.append(bytearray(piece))

    def blocks(self) -> tuple[Block, ...]:
        """When all is here: a memoryview for each block, or a tuple of them where it came in several parts."""
        count, size = len(self.wanted.handle.slots), self.wanted.handle.block_bytes
        return tuple(_cut(self._parts, size)) if size else (memoryview(b""),) * count

    def drop(self) -> None:
        """Let go of its memory."""
        self._parts.clear()

    def problem(self) -> KVCorrupt | None:
        """When all is here."""
        if self._digest is None or self._digest.intdigest() == self.wanted.digest:
            return None
        found, announced = self._digest.intdigest(), self.wanted.digest
        return KVCorrupt(f"{self.wanted.handle.segment}: digest {found:016x}, announced {announced:016x}")


@dataclass(slots=True)
class Peer:
    """A peer that is known. `clock`: since when it owes something and has brought nothing; `looked`: when the clocks of
    its takes were looked at."""

    segment: str
    up: bool = False
    granted: int = 0  # on this connection
    consumed: int = 0
    clock: float = 0.0
    looked: float = 0.0
    up_at: float = 0.0
    fetches: dict[int, ChunkFetch] = field(default_factory=dict)  # by number; started or not

    @property
    def owes(self) -> bool:
        return any(fetch.started for fetch in self.fetches.values()) if self.up else bool(self.fetches)


class Fetching:
    """`buffer` is the memory for all takes, `credit` what one connection may have under way, both in bytes."""

    def __init__(self, buffer: int, credit: int, patience: StreamPatience) -> None:
        self.buffer, self.credit, self.patience = buffer, credit, patience
        self.peers: dict[str, Peer] = {}
        self.used = 0  # bytes of takes that have started and are not given back
        self._waiting: dict[str, deque[ChunkFetch]] = {}  # by request, the next one's turn first
        self._numbers = 0

    def meet(self, peer: str, segment: str) -> list[ChunkFetch]:
        """Another slab than before ends what was asked of the old one."""
        known = self.peers.get(peer)
        if known is not None and known.segment == segment:
            return []
        lost = self.part(peer)
        self.peers[peer] = Peer(segment)
        return lost

    def part(self, peer: str) -> list[ChunkFetch]:
        """The takes that are lost with it."""
        known = self.peers.pop(peer, None)
        return [] if known is None else [self._end(known, fetch) for fetch in list(known.fetches.values())]

    def want(self, wanted: Wanted, now: float) -> KVError | None:
        """A new take; or why it cannot be."""
        peer = self.peers.get(wanted.peer)
        if peer is None:
            return KVLost(f"no peer {wanted.peer} is known here")
        if peer.segment != wanted.handle.segment:
            theirs = wanted.handle.segment[:80]
            return KVForeign(f"the slab of {wanted.peer} is {peer.segment}, the handle is of {theirs!r}")
        problem = _unaskable(wanted.handle)
        if problem is not None:
            return KVForeign(f"{wanted.handle.segment}: {problem}")
        self._numbers += 1
        key = wanted.ticket[0]
        lane = next((fetch.lane for fetch in peer.fetches.values() if fetch.wanted.ticket[0] == key), self._numbers)
        fetch = ChunkFetch(wanted, self._numbers, lane)
        if not peer.owes:
            peer.clock = now
        peer.fetches[fetch.number] = fetch
        self._waiting.setdefault(key, deque()).append(fetch)
        return None

    def start(self, now: float) -> list[tuple[str, Fetch]]:
        """What to ask for now. A request whose peer takes no more now is passed over; one that waits for memory alone
        is not: nobody who comes after it takes that away."""
        fetches: list[tuple[str, Fetch]] = []
        began = -1
        while began < len(fetches):
            began = len(fetches)
            for key in list(self._waiting):
                fetch = self._waiting[key][0]
                peer = self.peers[fetch.wanted.peer]
                if not peer.up or sum(other.started for other in peer.fetches.values()) >= MAX_STARTED:
                    continue
                if self.used and self.used + fetch.size > self.buffer:
                    return fetches
                fetches.append((fetch.wanted.peer, self._begin(peer, fetch, now)))
        return fetches

    def _begin(self, peer: Peer, fetch: ChunkFetch, now: float) -> Fetch:
        if not peer.owes:
            peer.clock = now
        fetch.started, fetch.clock = True, now
        self.used += fetch.size
        queue = self._waiting.pop(fetch.wanted.ticket[0])
        queue.popleft()
        if queue:
            self._waiting[fetch.wanted.ticket[0]] = queue  # behind the others
        return self._fetch(peer, fetch)

    def _fetch(self, peer: Peer, fetch: ChunkFetch) -> Fetch:
        peer.granted = max(peer.granted, peer.consumed + self.credit)
        return Fetch(
            number=fetch.number,
            lane=fetch.lane,
            handle=fetch.wanted.handle,
            start=fetch.at,
            credit=peer.granted,
        )

    def up(self, name: str, now: float) -> list[Fetch]:
        """A new connection: what is asked of it at once, in the order in which it was asked first."""
        peer = self.peers[name]
        peer.up, peer.up_at, peer.granted, peer.consumed = True, now, 0, 0
        return [self._fetch(peer, fetch) for fetch in peer.fetches.values() if fetch.started]

    def down(self, name: str, now: float) -> None:
        peer = self.peers[name]
        if not peer.owes:
            peer.clock = now
        peer.up = False

    def due(self, name: str, number: int) -> ChunkFetch | None:
        """The take whose bytes these may be; None: of one that has ended."""
        fetch = self.peers[name].fetches.get(number)
        return fetch if fetch is not None and fetch.started else None

    def came(self, name: str, size: int) -> Credit | None:
        """A piece of `size` bytes is out of the connection, wanted or not; the credit to grant in its place."""
        peer = self.peers[name]
        peer.consumed += cost(size)
        if peer.granted - peer.consumed > self.credit * 3 // 4:
            return None
        peer.granted = peer.consumed + self.credit
        return Credit(credit=peer.granted)

    def grew(self, name: str, fetch: ChunkFetch, now: float) -> bool:
        """A piece was added to the take; True when that was the last."""
        peer = self.peers[name]
        peer.clock = fetch.clock = now
        if fetch.at < fetch.size:
            return False
        del peer.fetches[fetch.number]
        return True

    def gone(self, name: str, message: Gone, now: float) -> tuple[ChunkFetch, KVError] | None:
        peer = self.peers[name]
        fetch = peer.fetches.get(message.number)
        if fetch is None or not fetch.started:
            return None
        peer.clock = now
        kind = KVForeign if message.foreign else KVLost
        reason = "".join(char if char.isprintable() else "?" for char in message.reason)
        return self._end(peer, fetch), kind(f"{name}: {reason}")

    def _end(self, peer: Peer, fetch: ChunkFetch) -> ChunkFetch:
        """Its memory is given back by `used_up`."""
        del peer.fetches[fetch.number]
        key = fetch.wanted.ticket[0]
        if not fetch.started:
            self._waiting[key].remove(fetch)
            if not self._waiting[key]:
                del self._waiting[key]
        return fetch

    def used_up(self, size: int) -> None:
        """The engine has used so many bytes, or a started take has ended without it."""
        self.used -= size

    # ------------------------------------------------------------ time

    def stalled(self, now: float) -> list[str]:
        """Peers whose connection is to be made anew."""
        return [name for name, peer in self.peers.items() if now >= self._stalls(peer)]

    def lost(self, now: float) -> list[tuple[ChunkFetch, KVLost]]:
        """What is given up now: all that is asked of a peer which brings nothing, and a take that its peer passes over
        while it brings others."""
        found = []
        for name, peer in self.peers.items():
            silent = peer.owes and now >= peer.clock + self.patience.lost_s
            why = "brings nothing" if peer.up else "cannot be reached"
            for fetch in list(peer.fetches.values()) if silent or peer.owes and now >= peer.looked + _LOOK_S else ():
                overdue = fetch.started and now >= fetch.clock + _PASSED_OVER * self.patience.lost_s
                if overdue or (silent and (fetch.started or not peer.up)):
                    problem = KVLost(f"{name} {why} since {self.patience.lost_s:g} s or more; look at its log")
                    found.append((self._end(peer, fetch), problem))
                peer.looked = now
        return found

    def deadline(self) -> float | None:
        """When `stalled` or `lost` has something, if nothing comes; earlier rather than later."""
        owing = [peer for peer in self.peers.values() if peer.owes]
        times = [min(self._stalls(peer), peer.clock + self.patience.lost_s) for peer in owing]
        return min(times, default=None)

    def _stalls(self, peer: Peer) -> float:
        return max(peer.clock, peer.up_at) + self.patience.stall_s if peer.up and peer.owes else _NEVER


def _cut(parts: list[memoryview | bytearray], size: int) -> Iterator[Block]:
    """Blocks of `size` bytes out of what lies in `parts`."""
    block: list[memoryview] = []
    missing = size
    for whole in parts:
        part, at = memoryview(whole), 0
        while at < len(part):
            piece = part[at : at + missing]
            block.append(piece)
            at, missing = at + len(piece), missing - len(piece)
            if not missing:
                yield block[0] if len(block) == 1 else tuple(block)
                block, missing = [], size


def _unaskable(handle: Handle) -> str | None:
    """Why nobody could have given out this handle, or no Fetch can carry it."""
    if len(handle.slots) > MAX_SLOTS:
        return f"a chunk of {len(handle.slots)} blocks, at most {MAX_SLOTS} can be fetched: enlarge engine.block_tokens"
    if len(handle.slots) != len(handle.generations):
        return f"the handle has {len(handle.slots)} slots and {len(handle.generations)} generations"
    if not all(0 <= number < 1 << 63 for number in (*handle.slots, *handle.generations, handle.block_bytes)):
        return "a number in the handle is below 0 or beyond 63 bits"
    return None
