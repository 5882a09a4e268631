"""The dispatcher of a prefill worker: asks a decode instance to take a request, announces its chunks to it, and
asks another one when it is refused or the first is gone."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from random import Random
from typing import Any

from tetri.core.actions import Action, Broken, Send
from tetri.core.job import Job
from tetri.core.kvflow import Parcel
from tetri.core.peers import Identity, Neighbours
from tetri.core.pool import Pool
from tetri.core.timers import Timers
from tetri.request import LengthRange
from tetri.wire.handover import BetweenWorkers, Chunk, Drop, Foreseen, Grant, Offer
from tetri.wire.messages import Load


class Dispatcher:
    """`jobs` are the prefill half's, by key. Offers are numbered from 1 for the life of the process. `home`: the own
    load while this instance decodes too, else None."""

    def __init__(
        self,
        own: Identity,
        neighbours: Neighbours,
        timers: Timers[str],
        rng: Random,
        home: Callable[[], Load | None],
    ) -> None:
        self.own, self.timers, self.rng = own, timers, rng
        self.pool = Pool(own, neighbours, home)
        self.neighbours = neighbours
        self.jobs: dict[str, Job] = {}
        self.offers: dict[int, str] = {}  # open offers -> job key
        self.stranded: dict[str, Job] = {}  # no decode instance that is there could ever hold them
        self._unplaced: list[tuple[int, str]] = []  # turn and key, sorted; whoever is placed or gone may still be in it
        self._targets: dict[str, dict[int, None]] = {}  # instance -> open offers
        self._refused: dict[str, dict[str, str]] = {}  # job key -> decode instance -> why, since the last view
        self._judged = -1  # as of which version of the neighbours jobs were stranded
        self._number = 0

    def started(self, job: Job, now: float) -> None:
        """It wants a decode instance from now on, and waits for its predicted length only so long."""
        if job.unplaced:
            self._wants(job)
            if not job.predicted:
                self.timers.set(job.key, now + self.own.rules.length_wait_s)

    def settle(self, job: Job, length: LengthRange | None) -> None:
        """So long it will be, as far as anybody can say: it waits for that no longer."""
        job.predicted, job.length = True, length
        self.timers.clear(job.key)

    def correct(self, job: Job, length: LengthRange) -> list[Action]:
        """More is known than when it was settled. Who has been asked is told; nobody waits for that to arrive."""
        if length == job.length:
            return []
        job.length = length
        if job.flow.offer is None:
            return []
        return [Send(job.flow.target, Foreseen(**self.address(job), length=length))]

    def stalled(self) -> bool:
        """Whether a prompt that has started, and all behind it, wait for a decode instance that takes it."""
        first = self._first()
        return first is not None and first.predicted

    def waiting(self) -> bool:
        """Whether a prompt that has started is on offer nowhere yet, for whatever reason."""
        return self._first() is not None

    def _first(self) -> Job | None:
        for turn, key in self._unplaced:
            job = self.jobs.get(key)
            if job is not None and job.turn == turn and job.unplaced:
                return job
        return None

    def forgive(self, now: float) -> list[Action]:
        """There is news of the others: who refused may be asked again."""
        self._refused.clear()
        return self.dispatch(now)

    def dispatch(self, now: float) -> list[Action]:
        """Ask a decode instance for every job that needs one, in the order in which they were started, up to the
        first for which there is none. None is overtaken, or a large one might never find memory; so all wait for one
        whose length is still being predicted, `length_wait_s` at most."""
        if not self._unplaced and not self.stranded:
            return []
        self.pool.refresh()
        self._judge_again()
        actions: list[Action] = []
        while self._unplaced:
            turn, key = self._unplaced[0]
            job = self.jobs.get(key)
            if job is not None and job.turn == turn and job.unplaced:
                if not self.pool.fits(job):
                    self.stranded[key] = job
                    job.stranded_at = now
                elif not job.predicted or not self._place(job, now, actions):
                    break
            self._unplaced.pop(0)
        return actions

    def _judge_again(self) -> None:
        """Other instances are there: for some jobs there may be one now. Those that still have none may wait for an
        instance that comes, but nobody waits for them."""
        if self._judged == self.neighbours.version:
            return
        self._judged = self.neighbours.version
        for key, job in list(self.stranded.items()):
            if self.pool.fits(job):
                del self.stranded[key]
                job.stranded_at = None
                self._wants(job)

    def overdue(self, now: float, holds_up: Callable[[Job], bool]) -> list[tuple[Job, str, bool]]:
        """Stranded jobs that must not wait any longer: why, and whether another attempt may do better: elsewhere, or
        here behind those that it `holds_up`. With nobody else there, attempt after attempt here would use them up."""
        own, found, decodes = self.own, list[tuple[Job, str, bool]](), self.pool.home() is not None
        for job in self.stranded.values():
            assert job.stranded_at is not None
            waited, blocks = now - job.stranded_at, job.flow.blocks
            only_here = decodes and job.fits(own.capacity)
            retry = waited <= own.patience_s
            elsewhere = only_here and self.neighbours.prefills(job.goal)
            if retry and (waited <= own.view_s or not (elsewhere or holds_up(job))):
                continue
            why = f"no decode instance could be reached for {min(waited, own.patience_s):.3g} s"
            if only_here:
                least = blocks + own.slots - own.open_slots
                why = (
                    f"only {own.iid} could decode its prompt of {blocks} KV blocks, and not beside its own prefill: "
                    f"set transfer.slab_blocks to {least} at least, or start another worker"
                )
            found.append((job, why, retry))
        return found

    def _place(self, job: Job, now: float, actions: list[Action]) -> bool:
        need = job.need(self.own.rules, self.own.capacity.block_tokens)
        target = self.pool.choose(job, need, self._refused.get(job.key, ()), self.rng)
        if target is None:
            return False
        self._number += 1
        job.flow.aim(self._number, target)
        self.pool.claim(self._number, target, need)
        self.offers[self._number] = job.key
        self._targets.setdefault(target, {})[self._number] = None
        actions += self.repeat(job, now)
        return True

    def job_of(self, answer: BetweenWorkers) -> Job | None:
        """The job that this answers an offer for, None when the offer is an old one: perhaps of this instance's
        earlier incarnation, which numbered its offers from 1 too."""
        job = self.jobs.get(self.offers.get(answer.offer, ""))
        if job is None or (job.rid, job.attempt, job.flow.target) != (answer.rid, answer.attempt, answer.src):
            return None
        return job

    def granted(self, job: Job, now: float) -> None:
        assert job.flow.offer is not None
        job.flow.grant()
        self.pool.granted(job.flow.offer, now)

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
            **self.address(job),
            index=parcel.index,
            start=parcel.start,
            stop=parcel.stop,
            handle=parcel.handle,
            digest=parcel.digest,
            token=parcel.token,
        )
        return [Send(job.flow.target, chunk)]

    def refused(self, job: Job, why: str) -> None:
        """The target does not take it: another one must, or the same when there is news of its load."""
        assert job.flow.offer is not None
        self._refused.setdefault(job.key, {})[job.flow.target] = why
        self.pool.refused(job.flow.offer)
        self._clear(job)

    def withdraw(self, job: Job, why: str) -> list[Action]:
        """Take an offer back; the decode side keeps a request whose KV it has completely."""
        if job.flow.offer is None:
            return []
        drop = [] if job.flow.complete else [Send(job.flow.target, Drop(**self.address(job), why=why))]
        if drop:
            self.pool.taken_back(job.flow.offer)
        self._clear(job)
        return [*drop]

    def forget(self, job: Job, why: str) -> list[Action]:
        """The job is no longer among the others."""
        self.stranded.pop(job.key, None)
        self._refused.pop(job.key, None)
        self.timers.clear(job.key)
        return self.withdraw(job, why)

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
        return [self.jobs[self.offers[number]] for number in self._targets.get(iid, ())]

    def _wants(self, job: Job) -> None:
        insort(self._unplaced, (job.turn, job.key))

    def _clear(self, job: Job) -> None:
        number, target = job.flow.offer, job.flow.target
        assert number is not None
        del self.offers[number], self._targets[target][number]
        if not self._targets[target]:
            del self._targets[target]
        self.timers.clear(job.key)
        job.flow.clear_aim()
        if job.key in self.jobs and job.unplaced:
            self._wants(job)

    def _offer(self, job: Job) -> Send:
        offer = Offer(
            **self.address(job),
            fingerprint=self.own.instance.fingerprint,
            prompt=list(job.prompt),
            output=list(job.output),
            sampling=job.sampling,
            blocks=job.flow.blocks,
            length=job.length,
        )
        return Send(job.flow.target, offer)

    def address(self, job: Job) -> dict[str, Any]:
        """What the target knows its offer by."""
        return {
            "src": self.own.iid,
            "incarnation": self.own.incarnation,
            "rid": job.rid,
            "attempt": job.attempt,
            "offer": job.flow.offer,
        }

    def check(self) -> None:
        """Count everything again."""
        wanting = {(job.turn, key) for key, job in self.jobs.items() if job.unplaced and key not in self.stranded}
        if wanting - set(self._unplaced) or self._unplaced != sorted(self._unplaced):
            raise Broken(f"of {wanting} not all are in the line for a decode instance: {self._unplaced}")
        if any(self.jobs.get(key) is not job or not job.unplaced for key, job in self.stranded.items()):
            raise Broken(f"stranded, and on offer or gone: {list(self.stranded)}")
        targets = {iid: list(numbers) for iid, numbers in self._targets.items()}
        aimed: dict[str, list[int]] = {}
        for number, key in self.offers.items():
            if self.jobs[key].flow.offer != number:
                raise Broken(f"offer {number} is not what {key} is on offer as")
            aimed.setdefault(self.jobs[key].flow.target, []).append(number)
        if targets != aimed:
            raise Broken(f"offers by instance are {targets}, counted {aimed}")
        if any(claim.granted_at is None and number not in self.offers for number, claim in self.pool.claims.items()):
            raise Broken(f"claims of offers that are no more: {list(self.pool.claims)}")
