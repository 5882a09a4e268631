"""The dispatcher of a prefill worker: asks a decode instance to take a request, announces its chunks to it, and
asks another one when it is refused or the first is gone."""

from __future__ import annotations

from random import Random
from typing import Any

from tetri.core.actions import Action, Send
from tetri.core.job import Job
from tetri.core.kvflow import Parcel
from tetri.core.peers import Identity, Neighbours
from tetri.core.timers import Timers
from tetri.policy.rules import DECODE_ROUTES
from tetri.policy.views import DecodeView
from tetri.wire.messages import BetweenWorkers, Chunk, Drop, Grant, Offer


class Dispatcher:
    """`jobs` are the prefill half's, by key. Offers are numbered from 1 for the life of the process."""

    def __init__(self, own: Identity, neighbours: Neighbours, timers: Timers[str], rng: Random) -> None:
        self.own, self.neighbours, self.timers, self.rng = own, neighbours, timers, rng
        self.jobs: dict[str, Job] = {}
        self.offers: dict[int, str] = {}  # open offers -> job key
        self._number = 0

    def dispatch(self, now: float) -> list[Action]:
        """Ask a decode instance for every job that needs one, in the order in which they were started, up to the
        first for which there is none. None is overtaken: a granted job waits only for slots of the KV store that
        granted jobs before it give back, so reservations always come to an end."""
        actions: list[Action] = []
        known = list(self.neighbours.decoders())
        unplaced = sorted((job for job in self.jobs.values() if job.unplaced), key=lambda job: job.turn)
        for job in unplaced:
            able = [i for i in known if job.fits(i.capacity)]
            job.stranded_at = None if able else now if job.stranded_at is None else job.stranded_at
            if not able:
                continue  # it may wait for an instance that comes, but nobody waits for it
            views = [self._view(i.iid, self.neighbours.free_blocks(i)) for i in able if i.iid not in job.refused]
            target = DECODE_ROUTES[self.own.rules.decode_route](job.flow.blocks, views, self.rng)
            if target is None:
                break
            self._number += 1
            job.flow.aim(self._number, target)
            self.offers[self._number] = job.key
            actions += self.repeat(job, now)
        return actions

    def _view(self, iid: str, free_blocks: int) -> DecodeView:
        """A view may be older than what this dispatcher has offered since."""
        jobs = (self.jobs[key] for key in self.offers.values())
        on_offer = sum(j.flow.blocks for j in jobs if j.flow.target == iid and not j.flow.granted)
        return DecodeView(iid, free_blocks - on_offer)

    def job_of(self, answer: BetweenWorkers) -> Job | None:
        """The job that this answers an offer for, None when the offer is an old one: perhaps of this instance's
        earlier incarnation, which numbered its offers from 1 too."""
        job = self.jobs.get(self.offers.get(answer.offer, ""))
        if job is None or (job.rid, job.attempt, job.flow.target) != (answer.rid, answer.attempt, answer.src):
            return None
        return job

    def repeat(self, job: Job, now: float) -> list[Action]:
        """Say to the target all that it has not answered. What it knows already it answers again. When it has
        all, ask by the same words whether it still has: until the broker closes the job, nobody else knows. Of
        what it lost, the handles are old ones, and it refuses."""
        self.timers.set(job.key, now + self.own.offer_s)
        offer = [] if job.flow.granted else [self._offer(job)]
        parcels = job.flow.sent if job.flow.complete else job.flow.parcels.values()
        return [*offer, *(action for parcel in parcels for action in self.announce(job, parcel))]

    def announce(self, job: Job, parcel: Parcel) -> list[Action]:
        if job.flow.offer is None:
            return []
        chunk = Chunk(
            **self._address(job),
            index=parcel.index,
            start=parcel.start,
            stop=parcel.stop,
            handle=parcel.handle,
            digest=parcel.digest,
            token=parcel.token,
        )
        return [Send(job.flow.target, chunk)]

    def refused(self, job: Job, why: str) -> None:
        job.refused[job.flow.target] = why
        self._clear(job)

    def withdraw(self, job: Job, why: str) -> list[Action]:
        """Take an offer back; the decode side keeps a request whose KV it has completely."""
        if job.flow.offer is None:
            return []
        drop = [] if job.flow.complete else [Send(job.flow.target, Drop(**self._address(job), why=why))]
        self._clear(job)
        return [*drop]

    def renounce(self, grant: Grant) -> Action:
        """Take back what was granted to an offer that is no more."""
        drop = Drop(
            src=self.own.iid,
            incarnation=self.own.incarnation,
            rid=grant.rid,
            attempt=grant.attempt,
            offer=grant.offer,
            why="no such offer any more",
        )
        return Send(grant.src, drop)

    def aimed_at(self, iid: str) -> list[Job]:
        """Jobs on offer to this instance, those included whose KV is all there: the broker may not know it yet."""
        jobs = [self.jobs[key] for key in self.offers.values()]
        return [job for job in jobs if job.flow.target == iid]

    def _clear(self, job: Job) -> None:
        assert job.flow.offer is not None
        del self.offers[job.flow.offer]
        self.timers.clear(job.key)
        job.flow.clear_aim()

    def _offer(self, job: Job) -> Send:
        offer = Offer(
            **self._address(job),
            fingerprint=self.own.fingerprint,
            prompt=list(job.prompt),
            output=list(job.output),
            sampling=job.sampling,
            blocks=job.flow.blocks,
        )
        return Send(job.flow.target, offer)

    def _address(self, job: Job) -> dict[str, Any]:
        return {
            "src": self.own.iid,
            "incarnation": self.own.incarnation,
            "rid": job.rid,
            "attempt": job.attempt,
            "offer": job.flow.offer,
        }
