"""The state of a receiver's fetches over `stream`, and which fetches start next. Pure: no sockets; the caller passes
`now`, in seconds.

Memory: a fetch starts when its bytes fit into `buffer`, beside all started fetches whose bytes the engine has not yet
used. A fetch larger than `buffer` starts alone. Requests take turns in starting, so that a request with many waiting
chunks does not block the others. The chunks of one request start in order, and the peer sends them in order.

Credit: a connection may have `credit` bytes of pieces in flight. The reader takes each piece out of the connection
when it arrives and tops up the credit, whatever the engine does: memory limits the started fetches, credit the bytes
in flight.

Retry: a connection that breaks, or brings nothing for `stall_s`, is replaced, and its fetches resume after the bytes
received so far. This is safe: the server checks the slots' generations again, and the digest covers all bytes. When a
peer brings nothing for `lost_s`, its fetches end with KVLost; later ones after `again_s`, until it brings something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from xxhash import xxh3_64

from tetri.kv.base import Block, KVCorrupt, KVError, KVForeign, KVLost, Wanted
from tetri.wire.bulk import MAX_SLOTS, Credit, Fetch, Gone, cost
from tetri.wire.handover import Handle

MAX_STARTED = 256  # fetches from one peer
_NEVER = float("inf")
_PASSED_OVER = 4  # a fetch without bytes for this many times lost_s is lost, although its peer sends others
_SHORT = 64 << 10  # bytes: shorter pieces are copied, because small frames share libzmq's buffers
_LOOK_S = 1.0  # interval between checks for such fetches


@dataclass(frozen=True, slots=True)
class StreamPatience:
    """Timeouts in seconds: a connection without a piece for `stall_s` is replaced; fetches from a peer without a piece
    for `lost_s` are lost, and those after them already after `again_s`, so that a try costs a request little."""

    stall_s: float = 5.0  # a slow but live connection brings a piece of 1 MB at least this often
    lost_s: float = 15.0
    again_s: float = 2.0


class ChunkFetch:
    """One KV chunk in flight: `at` of `size` bytes have arrived. `number` identifies the fetch on the wire; `lane` is
    equal for all fetches of one request."""

    def __init__(self, wanted: Wanted, number: int, lane: int) -> None:
        self.wanted, self.number, self.lane = wanted, number, lane
        self.size = len(wanted.handle.slots) * wanted.handle.block_bytes
        self.at = 0
        self.started = False
        self.clock = 0.0  # time of the last bytes, or of the start
        self._parts: list[memoryview | bytearray] = []  # the bytes received, in order
        self._digest = None if wanted.digest is None else xxh3_64()

    def add(self, piece: memoryview) -> None:
        """Append the next bytes. The fetch owns their memory from now on."""
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
        """The blocks of a complete chunk: a memoryview each, or a tuple of them for a block that came in parts."""
        count, size = len(self.wanted.handle.slots), self.wanted.handle.block_bytes
        return tuple(_cut(self._parts, size)) if size else (memoryview(b""),) * count

    def drop(self) -> None:
        """Release the memory."""
        self._parts.clear()

    def problem(self) -> KVCorrupt | None:
        """Check a complete chunk: KVCorrupt when its digest is wrong, else None."""
        if self._digest is None or self._digest.intdigest() == self.wanted.digest:
            return None
        found, announced = self._digest.intdigest(), self.wanted.digest
        return KVCorrupt(f"{self.wanted.handle.segment}: digest {found:016x}, announced {announced:016x}")


@dataclass(slots=True)
class Peer:
    """A peer and its connection. `lost`: its last fetches were lost by silence. `clock`: time of the last bytes, or
    since when the peer owes bytes; `looked`: time of the last check of its fetches' clocks; `up_at`: time of the
    connection. Times in seconds."""

    segment: str
    up: bool = False
    lost: bool = False
    granted: int = 0  # credit on this connection, bytes
    consumed: int = 0  # bytes received on this connection
    clock: float = 0.0
    looked: float = 0.0
    up_at: float = 0.0
    fetches: dict[int, ChunkFetch] = field(default_factory=dict)  # by number; started or not

    @property
    def owes(self) -> bool:
        """Whether bytes, or a connection, are due from this peer."""
        return any(fetch.started for fetch in self.fetches.values()) if self.up else bool(self.fetches)


class Fetching:
    """All fetches of one receiver. `buffer`: memory for all started fetches; `credit`: limit in flight on one
    connection; both in bytes."""

    def __init__(self, buffer: int, credit: int, patience: StreamPatience) -> None:
        self.buffer, self.credit, self.patience = buffer, credit, patience
        self.peers: dict[str, Peer] = {}
        self.used = 0  # bytes of started fetches, until `used_up`
        self._waiting: dict[str, deque[ChunkFetch]] = {}  # by request, in the order of their turns
        self._numbers = 0

    def meet(self, peer: str, segment: str) -> list[ChunkFetch]:
        """Add a peer with its slab. If the slab is new, the fetches from the old one end; returns them."""
        known = self.peers.get(peer)
        if known is not None and known.segment == segment:
            return []
        lost = self.part(peer)
        self.peers[peer] = Peer(segment)
        return lost

    def part(self, peer: str) -> list[ChunkFetch]:
        """Remove a peer; returns its fetches, which are lost."""
        known = self.peers.pop(peer, None)
        return [] if known is None else [self._end(known, fetch) for fetch in list(known.fetches.values())]

    def want(self, wanted: Wanted, now: float) -> KVError | None:
        """Add a fetch; returns the problem if the peer or the handle does not allow it."""
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
        """The fetches to send now, as (peer, message). A request whose peer accepts no more fetches now is skipped. A
        request that waits for memory is not skipped: else later requests would always take that memory."""
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
            number=fetch.number, lane=fetch.lane, handle=fetch.wanted.handle, start=fetch.at, credit=peer.granted
        )

    def up(self, name: str, now: float) -> list[Fetch]:
        """A connection to the peer is up: returns the started fetches to send again, in their order."""
        peer = self.peers[name]
        peer.up, peer.up_at, peer.granted, peer.consumed = True, now, 0, 0
        return [self._fetch(peer, fetch) for fetch in peer.fetches.values() if fetch.started]

    def down(self, name: str, now: float) -> None:
        """The connection to the peer has ended."""
        peer = self.peers[name]
        if not peer.owes:
            peer.clock = now
        peer.up = False

    def due(self, name: str, number: int) -> ChunkFetch | None:
        """The started fetch with this number; None when it has ended."""
        fetch = self.peers[name].fetches.get(number)
        return fetch if fetch is not None and fetch.started else None

    def came(self, name: str, size: int) -> Credit | None:
        """A piece of `size` bytes was received, wanted or not; returns the credit to grant, if it is time to."""
        peer = self.peers[name]
        peer.consumed += cost(size)
        if peer.granted - peer.consumed > self.credit * 3 // 4:
            return None
        peer.granted = peer.consumed + self.credit
        return Credit(credit=peer.granted)

    def grew(self, name: str, fetch: ChunkFetch, now: float) -> bool:
        """A piece was added to the fetch; True when the fetch is complete."""
        peer = self.peers[name]
        peer.clock, fetch.clock, peer.lost = now, now, False
        if fetch.at < fetch.size:
            return False
        del peer.fetches[fetch.number]
        return True

    def gone(self, name: str, message: Gone, now: float) -> tuple[ChunkFetch, KVError] | None:
        """The peer refused a fetch: returns the fetch, now ended, and why; None when it has ended before."""
        peer = self.peers[name]
        fetch = peer.fetches.get(message.number)
        if fetch is None or not fetch.started:
            return None
        peer.clock, peer.lost = now, False
        kind = KVForeign if message.foreign else KVLost
        reason = "".join(char if char.isprintable() else "?" for char in message.reason)
        return self._end(peer, fetch), kind(f"{name}: {reason}")

    def _end(self, peer: Peer, fetch: ChunkFetch) -> ChunkFetch:
        """Remove a fetch. If it has started, the caller returns its memory with `used_up`."""
        del peer.fetches[fetch.number]
        key = fetch.wanted.ticket[0]
        if not fetch.started:
            self._waiting[key].remove(fetch)
            if not self._waiting[key]:
                del self._waiting[key]
        return fetch

    def used_up(self, size: int) -> None:
        """Return `size` bytes of `buffer`: the engine has used a chunk, or a started fetch has failed."""
        self.used -= size

    # ------------------------------------------------------------ time

    def stalled(self, now: float) -> list[str]:
        """Peers whose connection must be replaced."""
        return [name for name, peer in self.peers.items() if now >= self._stalls(peer)]

    def lost(self, now: float) -> list[tuple[ChunkFetch, KVLost]]:
        """End overdue fetches, and return them with the reason: all fetches from a silent peer, and a fetch that its
        peer skips while it sends others."""
        found = []
        for name, peer in self.peers.items():
            lost_s = self._lost_s(peer)
            silent = peer.owes and now >= peer.clock + lost_s
            why = "has sent no bytes" if peer.up else "could not be reached"
            for fetch in list(peer.fetches.values()) if silent or peer.owes and now >= peer.looked + _LOOK_S else ():
                overdue = fetch.started and now >= fetch.clock + _PASSED_OVER * self.patience.lost_s
                if overdue or (silent and (fetch.started or not peer.up)):
                    peer.lost = peer.lost or silent
                    problem = KVLost(f"{name} {why} for {lost_s:g} s or more; see its log")
                    found.append((self._end(peer, fetch), problem))
                peer.looked = now
        return found

    def deadline(self) -> float | None:
        """The latest time to call `stalled` and `lost` if nothing arrives; it may be too early. None: no such time."""
        owing = [peer for peer in self.peers.values() if peer.owes]
        times = [min(self._stalls(peer), peer.clock + self._lost_s(peer)) for peer in owing]
        return min(times, default=None)

    def _lost_s(self, peer: Peer) -> float:
        return min(self.patience.again_s, self.patience.lost_s) if peer.lost else self.patience.lost_s

    def _stalls(self, peer: Peer) -> float:
        return max(peer.clock, peer.up_at) + self.patience.stall_s if peer.up and peer.owes else _NEVER


def _cut(parts: list[memoryview | bytearray], size: int) -> Iterator[Block]:
    """Cut the bytes of `parts` into blocks of `size` bytes."""
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
    """Why the handle is invalid, or does not fit into a Fetch message; None when it does."""
    if len(handle.slots) > MAX_SLOTS:
        return f"a chunk of {len(handle.slots)} blocks, at most {MAX_SLOTS} can be fetched: enlarge engine.block_tokens"
    if len(handle.slots) != len(handle.generations):
        return f"the handle has {len(handle.slots)} slots and {len(handle.generations)} generations"
    if not all(0 <= number < 1 << 63 for number in (*handle.slots, *handle.generations, handle.block_bytes)):
        return "a number in the handle is below 0 or beyond 63 bits"
    return None
