"""The path between hosts that share no memory: the receiver asks the sender's server for the slots of a handle, and
gets them as pieces of at most 1 MB, over ZeroMQ and TCP (protocol.md, 8b)."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tetri.kv.base import Fetched, KVError, Wanted
from tetri.kv.slab import HostSlab
from tetri.kv.stream.fetch import ChunkFetch, Fetching, StreamPatience
from tetri.kv.stream.reader import SlabReader
from tetri.kv.stream.server import SlabServer
from tetri.net import keys
from tetri.net.bulk import context
from tetri.net.errors import NetError
from tetri.request import Reach

if TYPE_CHECKING:
    from tetri.kv import StoreSettings

ANYWHERE_HERE = "tcp://127.0.0.1:*"
LEAST_BUFFER = 64 << 20
USUAL_CHUNKS = 2  # that find room whatever `buffer` says: one that comes while the engine copies the other
_CREDIT_SHARE = 8  # of the room, what one connection may have under way
_LEAST_CREDIT, _MOST_CREDIT = 4 << 20, 256 << 20


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """`address` is where to listen; `announce` what others connect to, empty: that; `key` the file of the deployment's
    key, empty: none. `buffer`: bytes of memory for what arrives, at least two chunks of `usual` bytes."""

    address: str = ANYWHERE_HERE
    announce: str = ""
    key: str = ""
    buffer: int = LEAST_BUFFER
    usual: int = 0
    patience: StreamPatience = StreamPatience()


def open_stream(made: StoreSettings, slab: HostSlab, usual: int, wake: Callable[[], None]) -> StreamReader:
    """As a worker's settings ask for it. Raises KVError."""
    settings = StreamSettings(
        address=made.address or ANYWHERE_HERE, announce=made.announce, key=made.key, buffer=made.buffer, usual=usual
    )
    return StreamReader(slab, settings, wake)


class StreamReader:
    """Serves `slab`, and reads the slabs of others (`Reader` in base.py). `address` is for Reach. `counters`:
    read_<what> and served_<what>."""

    def __init__(self, slab: HostSlab, settings: StreamSettings, wake: Callable[[], None]) -> None:
        """Raises KVError: the address or the key cannot be used."""
        log = logging.getLogger("tetri.kv")
        self._wake = wake
        self._done: deque[tuple[Fetched, ChunkFetch | None]] = deque()
        self._lent: ChunkFetch | None = None
        self._crash: BaseException | None = None
        self._context = context()
        try:
            key = keys.load(settings.key) if settings.key else None
            self._server = SlabServer(self._context, slab, settings.address, key, wake, self._crashed, log)
        except NetError as error:
            self._context.term()
            raise KVError(f"KV path stream: {error}") from None
        self.address = settings.announce or self._server.address
        buffer = max(settings.buffer, USUAL_CHUNKS * settings.usual)
        credit = min(max(buffer // _CREDIT_SHARE, _LEAST_CREDIT), _MOST_CREDIT)
        fetching = Fetching(buffer, credit, settings.patience)
        self._reader = SlabReader(self._context, fetching, key, self._answer, self._crashed, log)
        self._server.start()
        self._reader.start()

    @property
    def counters(self) -> Counter[str]:
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
        """In the reader's thread."""
        blocks = () if fetch is None else fetch.blocks()
        self._done.append((Fetched(wanted.ticket, blocks, problem), fetch))
        self._wake()

    def _crashed(self, error: BaseException) -> None:
        self._crash = error
        self._wake()

    def _check(self) -> None:
        """A thread that has died would leave its takes without an answer, so the worker dies with it."""
        if self._crash is not None:
            raise self._crash

    def close(self) -> None:
        """What is under way is dropped. A second call does nothing."""
        self._reader.close()
        self._server.close()
        self._context.term()
