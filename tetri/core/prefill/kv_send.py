"""KV on its way out of a prefill instance: through slots of its own store, chunk by chunk, until it has landed.

Why requests and slots cannot wait for each other in a circle (the banker's argument). A request is *granted* when a
decode instance has reserved memory for its whole prompt. What is in slots of a granted request is taken out whatever
happens, and those slots come back; what is in slots of any other request waits for memory of a decode instance, which
may be the very memory that was granted to one that waits for slots here. Therefore:

    Requests that are not granted together keep at most `slots - reserve` slots (`Identity.open_slots`), where `reserve`
    are the blocks that one chunk may fill. Granted ones may take every slot.

So a granted request always finds slots for its next chunk: those of the reserve are free, or another granted request
has them and gives them back. Nor does it wait for another's memory: its own has been reserved on both sides, and it
goes past those that may not go on (core/prefill/scheduler.py). So every granted request ends, on every instance, its memory goes
to the next, and in the end each is granted. Whoever waits for its turn to take slots is asked for all the same
(`Prefill.plan`), or with a small store, in which the first chunk fits into the reserve only, none would begin.

Only a grant that comes to nothing breaks the rule: the decode instance is gone, or has let go. `KVOutflow.forsaken` marks
such a request, whose slots may be more than the open ones, until it is granted again. If all memory that is left has
been granted to one that waits for those very slots, nothing else would ever bring them back: `slot_deadlock` names one that
must be given up then.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tetri.core.actions import Action, Broken, Export, Exported, Free
from tetri.core.instance.identity import Identity
from tetri.core.prefill.dispatcher import Dispatcher
from tetri.core.prefill.request import KVChunk, PrefillRequest
from tetri.wire.handover import Handle


@dataclass(frozen=True, slots=True)
class Spare:
    """Slots for the next chunk: `free` for granted requests, no more than `open` of them for others."""

    free: int
    open: int


class KVSend:
    """`fetched` slots of the own store hold KV, will when an `Export` is carried out, or are not yet free again.
    `keeping`: the jobs that they are taken for, by key."""

    def __init__(self, own: Identity, dispatcher: Dispatcher) -> None:
        self.own, self.dispatcher = own, dispatcher
        self.keeping: dict[str, PrefillRequest] = {}
        self.used = 0

    def spare(self) -> Spare:
        kept = sum(request.flow.kept for request in self.keeping.values() if not request.granted)
        return Spare(self.own.slots - self.used, self.own.open_slots - kept)

    def slot_deadlock(self) -> PrefillRequest | None:
        """The youngest of those whose grants came to nothing and that nobody takes, when no slots will come back."""
        keeping = self.keeping.values()
        if any(request.granted for request in keeping):
            return None
        grant_lost = [request for request in keeping if request.flow.grant_lost and request.unplaced]
        return max(grant_lost, key=lambda request: request.turn, default=None)

    def export(self, request: PrefillRequest) -> list[Action]:
        """Put what a step has completed of its blocks into the store."""
        start, stop = request.flow.exported, request.filled(request.done, self.own.capacity.block_tokens)
        if stop == start:
            return []
        index = request.flow.chunks
        request.flow.chunks, request.flow.exported = index + 1, stop
        request.flow.awaited[index] = (start, stop)
        self.used += stop - start
        self.keeping[request.key] = request
        return [Export(request.key, index, start, stop)]

    def exported(self, request: PrefillRequest | None, event: Exported) -> list[Action]:
        """It is there: announce it, unless nobody wants it any more: the job has begun again, perhaps."""
        if (
            request is None
            or request.end is not None
            or request.flow.awaited.get(event.index) != (event.start, event.stop)
        ):
            return [self._free(event.handle)]
        del request.flow.awaited[event.index]
        token = request.token if event.stop == request.flow.blocks else None
        chunk = KVChunk(event.index, event.start, event.stop, event.handle, event.digest, token)
        request.flow.put(chunk)
        return self.dispatcher.announce(request, chunk)

    def landed(self, request: PrefillRequest, index: int) -> list[Action]:
        handle = request.flow.land(index)
        if not request.flow.kept:
            self.keeping.pop(request.key, None)
        return [] if handle is None else [self._free(handle)]

    def drain(self, request: PrefillRequest) -> list[Action]:
        """Give all of it up."""
        self.keeping.pop(request.key, None)
        return [self._free(handle) for handle in request.flow.drain()]

    def _free(self, handle: Handle) -> Free:
        return Free(handle)

    def freed(self, slots: int) -> None:
        """Nobody reads or writes them any more."""
        self.used -= slots

    def check(self, requests: Collection[PrefillRequest]) -> None:
        for request in requests:
            kept = sum(chunk.stop - chunk.start for chunk in request.flow.in_flight.values())
            if request.end is None and kept + request.flow.landed > request.flow.exported:
                raise Broken(f"{request.key} moved more blocks than it exported")
        if {request.key for request in requests if request.end is None and request.flow.kept} != {*self.keeping}:
            raise Broken(f"slots are kept for others than {list(self.keeping)}")
        waiting = sum(
            request.flow.kept
            for request in self.keeping.values()
            if not request.granted and not request.flow.grant_lost
        )
        if waiting > self.own.open_slots:
            raise Broken(f"{waiting} slots are kept for whom nobody takes yet, {self.own.open_slots} may be")
        if not 0 <= self.used <= self.own.slots:
            raise Broken(f"{self.used} of {self.own.slots} slots taken")
