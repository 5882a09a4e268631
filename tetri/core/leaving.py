"""KV on its way out of a prefill instance: through slots of its own store, chunk by chunk, until it has landed.

Why requests and slots cannot wait for each other in a circle (the banker's argument). A request is *granted* when a
decode instance has reserved memory for its whole prompt. What is in slots of a granted request is taken out whatever
happens, and those slots come back; what is in slots of any other request waits for memory of a decode instance, which
may be the very memory that was granted to one that waits for slots here. Therefore:

    Requests that are not granted together keep at most `slots - reserve` slots (`Identity.open_slots`), where `reserve`
    are the blocks that one chunk may fill. Granted ones may take every slot.

So a granted request always finds slots for its next chunk: those of the reserve are free, or another granted request
has them and gives them back. Nor does it wait for another's memory: its own has been reserved on both sides, and it
goes past those that may not go on (core/prefill.py). So every granted request ends, on every instance, its memory goes
to the next, and in the end each is granted. Whoever waits for its turn to take slots is asked for all the same
(`Prefill.plan`), or with a small store, in which the first chunk fits into the reserve only, none would begin.

Only a grant that comes to nothing breaks the rule: the decode instance is gone, or has let go. `Outflow.forsaken` marks
such a request, whose slots may be more than the open ones, until it is granted again. If all memory that is left has
been granted to one that waits for those very slots, nothing else would ever bring them back: `jammed` names one that
must be given up then.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tetri.core.actions import Action, Broken, Export, Exported, Free
from tetri.core.dispatch import Dispatcher
from tetri.core.job import Job
from tetri.core.kvflow import Parcel
from tetri.core.peers import Identity
from tetri.wire.handover import Handle


@dataclass(frozen=True, slots=True)
class Spare:
    """Slots for the next chunk: `free` for granted requests, no more than `open` of them for others."""

    free: int
    open: int


class Leaving:
    """`taken` slots of the own store hold KV, will when an `Export` is carried out, or are not yet free again.
    `keeping`: the jobs that they are taken for, by key."""

    def __init__(self, own: Identity, dispatcher: Dispatcher) -> None:
        self.own, self.dispatcher = own, dispatcher
        self.keeping: dict[str, Job] = {}
        self.taken = 0

    def spare(self) -> Spare:
        kept = sum(job.flow.kept for job in self.keeping.values() if not job.granted)
        return Spare(self.own.slots - self.taken, self.own.open_slots - kept)

    def jammed(self) -> Job | None:
        """The youngest of those whose grants came to nothing and that nobody takes, when no slots will come back."""
        keeping = self.keeping.values()
        if any(job.granted for job in keeping):
            return None
        forsaken = [job for job in keeping if job.flow.forsaken and job.unplaced]
        return max(forsaken, key=lambda job: job.turn, default=None)

    def export(self, job: Job) -> list[Action]:
        """Put what a step has completed of its blocks into the store."""
        start, stop = job.flow.exported, job.filled(job.done, self.own.capacity.block_tokens)
        if stop == start:
            return []
        index = job.flow.chunks
        job.flow.chunks, job.flow.exported = index + 1, stop
        job.flow.awaited[index] = (start, stop)
        self.taken += stop - start
        self.keeping[job.key] = job
        return [Export(job.key, index, start, stop)]

    def exported(self, job: Job | None, event: Exported) -> list[Action]:
        """It is there: announce it, unless nobody wants it any more: the job has begun again, perhaps."""
        if job is None or job.end is not None or job.flow.awaited.get(event.index) != (event.start, event.stop):
            return [self._free(event.handle)]
        del job.flow.awaited[event.index]
        token = job.token if event.stop == job.flow.blocks else None
        parcel = Parcel(event.index, event.start, event.stop, event.handle, event.digest, token)
        job.flow.put(parcel)
        return self.dispatcher.announce(job, parcel)

    def landed(self, job: Job, index: int) -> list[Action]:
        handle = job.flow.land(index)
        if not job.flow.kept:
            self.keeping.pop(job.key, None)
        return [] if handle is None else [self._free(handle)]

    def drain(self, job: Job) -> list[Action]:
        """Give all of it up."""
        self.keeping.pop(job.key, None)
        return [self._free(handle) for handle in job.flow.drain()]

    def _free(self, handle: Handle) -> Free:
        return Free(handle)

    def freed(self, slots: int) -> None:
        """Nobody reads or writes them any more."""
        self.taken -= slots

    def check(self, jobs: Collection[Job]) -> None:
        for job in jobs:
            kept = sum(parcel.stop - parcel.start for parcel in job.flow.parcels.values())
            if job.end is None and kept + job.flow.landed > job.flow.exported:
                raise Broken(f"{job.key} moved more blocks than it exported")
        if {job.key for job in jobs if job.end is None and job.flow.kept} != {*self.keeping}:
            raise Broken(f"slots are kept for others than {list(self.keeping)}")
        waiting = sum(job.flow.kept for job in self.keeping.values() if not job.granted and not job.flow.forsaken)
        if waiting > self.own.open_slots:
            raise Broken(f"{waiting} slots are kept for whom nobody takes yet, {self.own.open_slots} may be")
        if not 0 <= self.taken <= self.own.slots:
            raise Broken(f"{self.taken} of {self.own.slots} slots taken")
