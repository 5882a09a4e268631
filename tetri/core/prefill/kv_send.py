"""KV send: exports the KV of prefill requests into slots of the own slab, chunk by chunk, until it has landed.

Why requests and slots cannot deadlock (the banker's argument). A request is *granted* when a decode instance has
reserved memory for its whole prompt. KV of a granted request is always fetched, so its slots come back. KV of any other
request waits for memory of a decode instance, and that memory may be reserved for a request that waits for slots here.
Therefore:

    Requests without a grant together keep at most `slots - reserve` slots (`Identity.open_slots`), where `reserve` is
    the number of blocks that one chunk may fill. Granted requests may use every slot.

So a granted request always finds slots for its next chunk: the slots of the reserve are free, or another granted
request holds them and returns them. It does not wait for memory either: that is reserved on both sides, and it
overtakes requests that must not go on (`queue.fill`). So every granted request ends, on every instance; its memory goes
to the next, and in the end each is granted. A request that waits for slots is offered all the same
(`PrefillScheduler.plan`). Otherwise none would begin with a small slab, where a first chunk fits only into the reserve.

Only a lost grant breaks the rule: the decode instance has disappeared, or has dropped the request.
`KVOutflow.grant_lost` marks such a request until it is granted again; its slots may be more than `open_slots`. If all
remaining memory is granted to a request that waits for those very slots, nothing else brings them back:
`KVSend.slot_deadlock` returns the request to give up then.
"""

from __future__ import annotations

from collections.abc import Collection

from tetri.core.actions import Action, Broken, Export, Exported, Free
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.prefill.dispatcher import Dispatcher
from tetri.core.prefill.request import KVChunk, PrefillRequest
from tetri.request import Value


class Spare(Value, frozen=True):
    """Slots for the next chunk: `free` of them for granted requests, at most `open` of those for others."""

    free: int
    open: int


class KVSend:
    """Accounts for the slots of the own slab.

    used       slots that hold KV, are reserved for a pending `Export`, or are not free again yet
    keeping    the requests that these slots belong to, by key; the dispatcher's
    """

    def __init__(self, own: Identity, dispatcher: Dispatcher, activity: ActivityLog) -> None:
        self.own, self.dispatcher, self.activity = own, dispatcher, activity
        self.keeping = dispatcher.keeping
        self.used = 0

    def spare(self) -> Spare:
        """Return the slots that the next chunk may use."""
        kept = 0
        for request in self.keeping.values():
            flow = request.flow
            if not flow.granted:
                kept += flow.exported - flow.landed  # flow.kept, without a call: a busy worker asks after each event
        return Spare(self.own.slots - self.used, self.own.open_slots - kept)

    def slot_deadlock(self) -> PrefillRequest | None:
        """Return the youngest request that has lost its grant and has no other; None if a granted one will return
        slots."""
        keeping = self.keeping.values()
        if any(request.granted for request in keeping):
            return None
        grant_lost = [request for request in keeping if request.flow.grant_lost and request.lacks_memory]
        return max(grant_lost, key=lambda request: request.turn, default=None)

    def free(self) -> int:
        """Return the slots that running decodes may use, which go on elsewhere: they are granted."""
        return self.own.slots - self.used

    def use(self, slots: int) -> None:
        """Count slots as used that running decodes export into."""
        self.used += slots

    def export(self, request: PrefillRequest) -> list[Action]:
        """Export the blocks that the last step has completed, as one chunk."""
        start, stop = request.flow.exported, request.filled(request.done, self.own.capacity.block_tokens)
        if stop == start:
            return []
        index = request.flow.chunks
        request.flow.chunks, request.flow.exported = index + 1, stop
        request.flow.awaited[index] = (start, stop, self.activity.now)
        self.used += stop - start
        self.keeping[request.key] = request
        return [Export(request.key, index, start, stop)]

    def exported(self, request: PrefillRequest | None, event: Exported) -> list[Action]:
        """Announce a chunk that is in the slab now. Free it if the request has ended or started again meanwhile."""
        awaited = request.flow.awaited if request is not None and request.decodes else {}
        start, stop, since = awaited.get(event.index, (0, 0, 0.0))
        if request is None or (start, stop) != (event.start, event.stop):
            return [Free(event.handle)]
        del awaited[event.index]
        self.activity.add("export", request.lead, since, "", start, stop, event.index)
        request.flow.put(KVChunk(event.index, event.start, event.stop, event.handle, event.digest))
        return self.dispatcher.announce(request, request.flow.unannounced())

    def landed(self, request: PrefillRequest, index: int) -> list[Action]:
        """Free the slots of a chunk that the decode instance has copied."""
        handle = request.flow.land(index)
        if not request.flow.kept:
            self.keeping.pop(request.key, None)
        return [] if handle is None else [Free(handle)]

    def drain(self, request: PrefillRequest) -> list[Action]:
        """Free all slots of the request."""
        self.keeping.pop(request.key, None)
        return [Free(handle) for handle in request.flow.drain()]

    def freed(self, slots: int) -> None:
        """Count `slots` as free: no reader and no writer uses them any more."""
        self.used -= slots

    def check(self, requests: Collection[PrefillRequest]) -> None:
        """Raise Broken when the slots disagree with the requests, or too many belong to requests without a grant."""
        for request in requests:
            kept = sum(chunk.stop - chunk.start for chunk in request.flow.in_flight.values())
            if request.decodes and not request.flow.stays and kept + request.flow.landed > request.flow.exported:
                raise Broken(f"{request.key} moved more blocks than it exported")
        if {request.key for request in requests if request.decodes and request.flow.kept} != {*self.keeping}:
            raise Broken(f"slots are kept for others than {list(self.keeping)}")
        waiting = sum(each.flow.kept for each in self.keeping.values() if not each.granted and not each.flow.grant_lost)
        if waiting > self.own.open_slots:
            raise Broken(f"{waiting} slots are kept for whom nobody takes yet, {self.own.open_slots} may be")
        if not 0 <= self.used <= self.own.slots:
            raise Broken(f"{self.used} of {self.own.slots} slots are used")
