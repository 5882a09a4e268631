"""The thread that fetches KV chunks from peers' slabs over `stream`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from tetri.instance import Reach
from tetri.kv.base import KVError, KVLost, Wanted
from tetri.kv.stream.fetch import ChunkFetch, Fetching
from tetri.kv.stream.thread import Crashed, SlabThread
from tetri.net.bulk import BulkLink
from tetri.net.errors import NetError
from tetri.net.keys import Key
from tetri.net.sockets import Context
from tetri.wire import codec
from tetri.wire.bulk import PIECE_BYTES, BulkReply, Gone, Piece

AGAIN_S, LONGEST_AGAIN_S = 0.025, 0.8  # delay between attempts to connect; doubles each time
_MOST_READ = 64  # messages read from one connection before the next connection

Command = Callable[[], None]
Answer = Callable[[Wanted, ChunkFetch | None, KVError | None], None]


class SlabReader(SlabThread):
    """The thread `kv-read`. Other threads may call `start`, `do` and `close` only. `answer` is called once for each
    fetch; pass a ChunkFetch that it gets to `used`."""

    def __init__(self, context: Context, fetching: Fetching, key: Key, answer: Answer, crashed: Crashed) -> None:
        super().__init__("kv-read", crashed)
        self._context, self._fetching, self._key, self._answer = context, fetching, key, answer
        self._addresses: dict[str, str] = {}  # by peer
        self._links: dict[str, BulkLink] = {}
        self._again: dict[str, float] = {}  # by peer: time of the next attempt to connect
        self._tries: dict[str, int] = {}  # by peer: attempts to connect since the last piece
        self._commands: deque[Command] = deque()

    def do(self, command: Command) -> None:
        """Run `command` in the thread. Callable from any thread."""
        self._commands.append(command)
        self._waker.ring()

    def release(self) -> None:
        for link in self._links.values():
            link.close()

    # ------------------------------------------------------------ commands, in the thread

    def meet(self, peer: str, reach: Reach) -> None:
        known = self._fetching.peers.get(peer)
        if known is None or known.segment != reach.segment or self._addresses[peer] != reach.address:
            self.part(peer)
            self._fetching.meet(peer, reach.segment)
            self._addresses[peer] = reach.address

    def part(self, peer: str) -> None:
        self._close(peer)
        self._addresses.pop(peer, None)
        self._again.pop(peer, None)
        self._tries.pop(peer, None)
        for fetch in self._fetching.part(peer):
            self._end(fetch, KVLost(f"{peer} is gone"))

    def want(self, wanted: Wanted) -> None:
        """Queue a fetch, or answer at once why it cannot be."""
        problem = self._fetching.want(wanted, time.monotonic())
        if problem is not None:
            self._answer(wanted, None, problem)

    def used(self, fetch: ChunkFetch) -> None:
        """Free the memory of a fetch that `answer` passed on."""
        self._fetching.used_up(fetch.size)
        fetch.drop()

    # ------------------------------------------------------------ the thread

    def turn(self, ready: list[object]) -> None:
        while self._commands:
            self._commands.popleft()()
        for name, link in list(self._links.items()):
            if link.monitor in ready or link.socket in ready:
                self._look(name, link)
        self._time(time.monotonic())
        for name, fetch in self._fetching.start(time.monotonic()):
            self._send(name, codec.encode(fetch))

    def timeout(self) -> float | None:
        times = [self._again[name] for name in self._again if name not in self._links]
        if (deadline := self._fetching.deadline()) is not None:
            times.append(deadline)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _time(self, now: float) -> None:
        for name in self._fetching.stalled(now):
            self.counters["stalled"] += 1
            self._close(name)
        for fetch, problem in self._fetching.lost(now):
            self._end(fetch, problem)
        for name, peer in list(self._fetching.peers.items()):
            if not peer.fetches:
                self._again.pop(name, None)
            elif name not in self._links and now >= self._again.get(name, 0.0):
                self._open(name, now)

    def _send(self, name: str, frame: bytes) -> None:
        link = self._links.get(name)
        if link is not None and not link.send(frame):
            self._cut(name, "does not read what it is asked")

    def _open(self, name: str, now: float) -> None:
        tries = self._tries[name] = self._tries.get(name, 0) + 1
        self._again[name] = now + min(AGAIN_S * 2.0**tries, LONGEST_AGAIN_S)
        try:
            link = BulkLink(self._context, self._addresses[name], self._key)
        except NetError as error:
            segment = self._fetching.peers[name].segment
            for fetch in self._fetching.part(name):
                self._end(fetch, KVLost(f"{name}: {error}"))
            self._fetching.meet(name, segment)
            return
        self._links[name] = link
        self._watch.add(link.socket, link.monitor)

    def _close(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            self._watch.remove(link.socket, link.monitor)
            link.close()
            self._fetching.down(name, time.monotonic())

    def _cut(self, name: str, why: str) -> None:
        """Close the connection; fetches resume over a new one."""
        if self._fetching.peers[name].fetches:  # a connection that ends while idle is no problem
            self.counters["cut"] += 1
            level = logging.DEBUG if self._tries.get(name, 0) > 1 else logging.WARNING
            self._log.log(level, "KV from %s: %s; connecting again", name, why)
        self._close(name)

    def _end(self, fetch: ChunkFetch, problem: KVError) -> None:
        if fetch.started:
            self.used(fetch)
        self._answer(fetch.wanted, None, problem)

    # ------------------------------------------------------------ one connection

    def _look(self, name: str, link: BulkLink) -> None:
        was = link.up
        link.look()
        if link.up and not was:
            for fetch in self._fetching.up(name, time.monotonic()):
                self.counters["resumed"] += 1
                self._send(name, codec.encode(fetch))
        for _ in range(_MOST_READ):  # also from a broken connection: the bytes before the break are good
            header = link.receive() if self._links.get(name) is link else None
            if header is None:
                break
            problem = self._message(name, link, header)
            if problem is not None:
                self._cut(name, problem)
        else:
            return  # the rest is read after the other connections
        if link.broken and self._links.get(name) is link:
            self._cut(name, "refuses this worker's key" if link.refused else "the connection broke")

    def _message(self, name: str, link: BulkLink, header: bytes) -> str | None:
        """Handle one message; returns what is wrong with it, or None. A wrong message ends the connection."""
        try:
            message = codec.decode(header, BulkReply)
        except codec.WireError as error:
            self.counters[f"garbage_{error.kind}"] += 1
            return f"garbage: {error}"
        if isinstance(message, Piece):
            return self._piece(name, link, message)
        if link.more:
            self.counters["garbage_frames"] += 1
            return "more frames than a message has"
        if isinstance(message, Gone):
            ended = self._fetching.gone(name, message, time.monotonic())
            if ended is not None:
                self._end(*ended)
        return None

    def _piece(self, name: str, link: BulkLink, piece: Piece) -> str | None:
        if not link.more:
            self.counters["garbage_frames"] += 1
            return "a piece without its bytes"
        fetch = self._fetching.due(name, piece.number)
        if fetch is None:
            self.counters["late"] += 1
            self._top_up(name, link.drop())
            return None
        payload = link.receive_frame()
        size, due = len(payload), min(PIECE_BYTES, fetch.size - fetch.at)
        surplus = link.more
        self._top_up(name, size)
        if surplus or piece.start != fetch.at or size > due or (fetch.size and not size):
            self.counters["garbage_piece"] += 1
            return f"a piece of {size} bytes at {piece.start}, where one at {fetch.at} was due"
        fetch.add(payload)
        self._tries[name] = 0
        if self._fetching.grew(name, fetch, time.monotonic()):
            problem = fetch.problem()
            if problem is None:
                self._answer(fetch.wanted, fetch, None)
            else:
                self._end(fetch, problem)
        return None

    def _top_up(self, name: str, size: int) -> None:
        credit = self._fetching.came(name, size)
        if credit is not None:
            self._send(name, codec.encode(credit))
