"""The thread that serves this worker's slab over `stream` while the worker computes."""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial
from typing import Any

from tetri.kv.slab import HostSlab, shape_problem
from tetri.kv.stream.serve import Due, Serving, spans
from tetri.kv.stream.thread import Crashed, SlabThread, Wake
from tetri.net.bulk import BulkServer
from tetri.net.keys import Key
from tetri.net.sockets import Context
from tetri.wire import codec
from tetri.wire.bulk import Alive, BulkRequest, Piece
from tetri.wire.handover import Handle

LET_GO_S = 0.02  # longest delay until a slot that libzmq released is reported as free
_MOST_READ = 256  # messages read between two rounds of sending
_ALIVE = codec.encode(Alive())


class SlabServer(SlabThread):
    """The thread `kv-serve`. `wake` is called when libzmq has released a slot that is now free."""

    def __init__(
        self, context: Context, slab: HostSlab, address: str, key: Key, wake: Wake, crashed: Crashed
    ) -> None:
        """Raises NetError."""
        self._server = BulkServer(context, address, key)
        super().__init__("kv-serve", crashed)
        self._watch.add(*self._server.watched)
        self.address = self._server.address
        self._slab, self._wake = slab, wake
        self._serving = Serving(partial(shape_problem, slab.segment))
        # Views of the slab that libzmq still uses, and the handles of their slots.
        self._held: dict[int, tuple[weakref.ref[memoryview], Handle]] = {}
        self._released: deque[int] = deque()

    def timeout(self) -> float | None:
        return LET_GO_S if self._held else None

    def turn(self, ready: list[object]) -> None:
        self._let_go()
        self._server.admit()
        self._read()
        while (due := self._serving.next()) is not None:
            self._send(due)

    def release(self) -> None:
        self._server.close()

    def _read(self) -> None:
        for _ in range(_MOST_READ):
            received = self._server.receive()
            if received is None:
                return
            peer, frame = received
            try:
                message: Any = codec.decode(frame, BulkRequest)
            except codec.WireError as error:
                self._complain(error.kind, str(error))
                continue
            if peer not in self._serving.peers:
                self._look_who_is_left()
            answer = self._serving.received(peer, message)
            if answer is not None:
                self.counters["refused"] += 1
                self._server.send(peer, codec.encode(answer))

    def _look_who_is_left(self) -> None:
        """Forget connections that are gone: a new one often replaces an old one."""
        for peer in list(self._serving.peers):
            if self._server.send(peer, _ALIVE) is None:
                self._serving.forget(peer)

    def _complain(self, kind: str, reason: str) -> None:
        self.counters[f"garbage_{kind}"] += 1
        if self.counters[f"garbage_{kind}"] == 1:
            self._log.warning("%s: dropped a message: %s", self.address, reason)

    def _send(self, due: Due) -> None:
        if not self._slab.keep(due.slots):
            self.counters["gone"] += 1
            self._server.send(due.peer, codec.encode(self._serving.gone(due)))
            return
        header = codec.encode(Piece(number=due.number, start=due.start))
        sent = self._server.send(due.peer, header, self._payload(due))
        if sent:
            self._serving.sent(due)
            self.counters["pieces"] += 1
            self.counters["bytes"] += due.stop - due.start
        elif sent is None:
            self._serving.forget(due.peer)
        else:
            self._serving.full(due.peer)

    def _payload(self, due: Due) -> bytes | memoryview:
        """The piece's bytes: a view of the slab, whose slots are released with the last reference to the view; or a
        copy, with the slots released already."""
        blocks, handle = self._slab.segment.blocks, due.slots
        start = due.start % handle.block_bytes if handle.slots else 0  # in the bytes of the blocks that it touches
        inside = spans(handle, start, start + due.stop - due.start)
        parts = [blocks[first : first + size] for first, size in inside]
        if len(parts) != 1:
            copy = b"".join(parts)
            self._end_keep(due.slots)
            return copy
        view = weakref.ref(parts[0], self._release)
        self._held[id(view)] = (view, due.slots)
        return parts[0]

    def _release(self, view: weakref.ref[memoryview]) -> None:
        """Called in a thread of pyzmq, or wherever the last reference is dropped: so it takes no lock but the
        waker's."""
        self._released.append(id(view))
        if len(self._released) >= len(self._held):
            self._waker.ring()  # only for the last view; the thread handles the others when it is awake

    def _let_go(self) -> None:
        while self._released:
            self._end_keep(self._held.pop(self._released.popleft())[1])

    def _end_keep(self, handle: Handle) -> None:
        """Wake the worker if that makes slots free. The number of free slots does not tell: at any moment, the worker
        may take some for its next chunk."""
        if self._slab.let_go(handle):
            self._wake()
