"""KV on its way out of a prefill instance: through slots of its own store, chunk by chunk, until it has landed."""

from __future__ import annotations

from collections.abc import Iterable

from tetri.core.actions import Action, Broken, Export, Exported, Free
from tetri.core.dispatch import Dispatcher
from tetri.core.job import Job
from tetri.core.kvflow import Parcel
from tetri.core.peers import Identity
from tetri.wire.messages import Handle


class Leaving:
    """`taken` slots of the own store hold KV, will when an `Export` is carried out, or are not yet free again."""

    def __init__(self, own: Identity, dispatcher: Dispatcher) -> None:
        self.own, self.dispatcher = own, dispatcher
        self.taken = 0

    def export(self, job: Job) -> list[Action]:
        """Put what a step has completed of its blocks into the store."""
        start, stop = job.flow.exported, job.filled(job.done, self.own.capacity.block_tokens)
        if stop == start:
            return []
        index = job.flow.chunks
        job.flow.chunks, job.flow.exported = index + 1, stop
        job.flow.awaited[index] = (start, stop)
        self.taken += stop - start
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
        return [] if handle is None else [self._free(handle)]

    def drain(self, job: Job) -> list[Action]:
        """Give all of it up."""
        return [self._free(handle) for handle in job.flow.drain()]

    def _free(self, handle: Handle) -> Free:
        return Free(handle)

    def freed(self, slots: int) -> None:
        """Nobody reads or writes them any more."""
        self.taken -= slots

    def check(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            kept = sum(parcel.stop - parcel.start for parcel in job.flow.parcels.values())
            if job.end is None and kept + job.flow.landed > job.flow.exported:
                raise Broken(f"{job.key} moved more blocks than it exported")
        if not 0 <= self.taken <= self.own.slots:
            raise Broken(f"{self.taken} of {self.own.slots} slots taken")
