"""The path `stream`, between hosts that share no memory: the receiver requests the slots of a handle from the sender's
server and gets pieces of at most 1 MB, over ZeroMQ and TCP (docs/protocol.md, section 8b)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from tetri.instance import Reach
from tetri.kv.base import Fetched, KVError, Wanted
from tetri.kv.slab import HostSlab
from tetri.kv.stream.fetch import ChunkFetch, Fetching, StreamPatience
from tetri.kv.stream.reader import SlabReader
from tetri.kv.stream.server import SlabServer
from tetri.kv.stream.thread import Wake
from tetri.net import keys
from tetri.net.bulk import context
from tetri.net.errors import NetError

ANYWHERE_HERE = "tcp://127.0.0.1:*"
LEAST_BUFFER = 64 << 20
USUAL_CHUNKS = 2  # least chunks that fit the buffer: one arrives while the engine copies the other
_CREDIT_SHARE = 8  # one connection may have this fraction (1/8) of the buffer in flight
_LEAST_CREDIT, _MOST_CREDIT = 4 << 20, 256 << 20


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """`address`: where to listen. `announce`: the address that peers connect to, empty: `address`. `key`: file of the
    deployment's key. `buffer`: bytes of memory for arriving chunks, raised to two chunks of `usual`
    bytes."""

    address: str = ANYWHERE_HERE
    announce: str = ""
    key: str = ""
    buffer: int = LEAST_BUFFER
    usual: int = 0
    patience: StreamPatience = StreamPatience()


class StreamReader:
    """Serves `slab` to peers and reads their slabs (implements `Reader` of base.py). `address` goes into Reach."""

    def __init__(self, slab: HostSlab, settings: StreamSettings, wake: Wake) -> None:
        """Raises KVError when the address or the key cannot be used."""
        self._wake = wake
        self._done: deque[tuple[Fetched, ChunkFetch | None]] = deque()
        self._lent: ChunkFetch | None = None
        self._crash: BaseException | None = None
        self._context = context()
        try:
            key = keys.load(settings.key)
            self._server = SlabServer(self._context, slab, settings.address, key, wake, self._crashed)
        except NetError as error:
            self._context.term()
            raise KVError(f"KV path stream: {error}") from None
        self.address = settings.announce or self._server.address
        buffer = max(settings.buffer, USUAL_CHUNKS * settings.usual)
        credit = min(max(buffer // _CREDIT_SHARE, _LEAST_CREDIT), _MOST_CREDIT)
        fetching = Fetching(buffer, credit, settings.patience)
        self._reader = SlabReader(self._context, fetching, key, self._answer, self._crashed)
        self._server.start()
        self._reader.start()

    @property
    def counters(self) -> Counter[str]:
        """Counters of both threads: read_<what> and served_<what>."""
        read = Counter({f"read_{name}": count for name, count in self._reader.counters.copy().items()})
        return read + Counter({f"served_{name}": count for name, count in self._server.counters.copy().items()})

    def meet(self, peer: str, reach: Reach) -> None:
        self._reader.do(partial(self._reader.meet, peer, reach))

    def part(self, peer: str) -> None:
        self._reader.do(partial(self._reader.part, peer))

    def fetch(self, wanted: Wanted) -> None:
        self._check()
        self._give_back()
        self._reader.do(partial(self._reader.want, wanted))

    def fetched(self) -> Iterable[Fetched]:
        self._check()
        self._give_back()
        while self._done:
            fetched, self._lent = self._done.popleft()
            yield fetched
            self._give_back()

    def _give_back(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self._reader.do(partial(self._reader.used, lent))

    def _answer(self, wanted: Wanted, fetch: ChunkFetch | None, problem: KVError | None) -> None:
        """Called in the reader's thread."""
        blocks = () if fetch is None else fetch.blocks()
        self._done.append((Fetched(wanted.ticket, blocks, problem), fetch))
        self._wake()

    def _crashed(self, error: BaseException) -> None:
        self._crash = error
        self._wake()

    def _check(self) -> None:
        """Raise the exception that ended a thread: its fetches would never be answered."""
        if self._crash is not None:
            raise self._crash

    def close(self) -> None:
        """End both threads and drop all fetches. A second call does nothing."""
        self._reader.close()
        self._server.close()
        self._context.term()
