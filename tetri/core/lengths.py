"""How long the outputs of the prompts here will be, as far as anybody can say: who is asked, until when a prompt waits
for the answer, and what follows when more is known (paper, section 3.3.2).

With `length = "trained"` the kind of predictor decides which answers there are:

    classifier  is asked when the prompt comes, and answers some time later
    hidden      the model's own state at the end of the prompt: it comes with the step that computes the last chunk
    both        as hidden; but a prompt of several chunks has the classifier's answer until the last one is computed
    prior       nobody: the lengths of all that ended here

A prompt is put on offer with the best of them that is there, and waits for a better one only while that costs little:
for the classifier `length_wait_s` at most and never past its last chunk; for its own hidden state when all of it is in
the very next chunk, or a prompt of several chunks would lose the time in which its KV could already leave. What comes
after the Offer corrects it (Foreseen), even when the prompt is long handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tetri.core.actions import Action, LengthKnown, Predict, Send
from tetri.core.dispatch import Dispatcher
from tetri.core.foresight import Foresight
from tetri.core.job import Job
from tetri.core.peers import Identity
from tetri.leg import Foretold, Span
from tetri.policy.length import moved_up
from tetri.request import LengthRange, Sampling
from tetri.wire.handover import Foreseen
from tetri.wire.messages import Close

#: Prompts that were handed over before their answer came; the oldest are forgotten.
MOST_PARTED = 256


@dataclass(frozen=True, slots=True)
class Parted:
    """One that is decoded at `target` by now, which knows it by `address`; it had so many `outputs` before."""

    target: str
    address: dict[str, Any]
    sampling: Sampling
    outputs: int


class Lengths:
    """Works on the dispatcher's jobs. `foresight` is None unless lengths are learnt. `late` counts the jobs that went
    on before their prediction had come."""

    def __init__(self, own: Identity, dispatcher: Dispatcher, foresight: Foresight | None) -> None:
        """Raises ValueError when lengths are to be learnt and nothing says from what."""
        if own.rules.length == "trained" and own.expected is None:
            raise ValueError(f'{own.iid}: length = "trained" needs what is expected before any traffic')
        self.dispatcher, self.foresight = dispatcher, foresight
        kind = "" if own.expected is None or foresight is None else own.expected.kind
        self._predicts = own.rules.length != "none"
        self._asks = self._predicts and kind not in ("hidden", "prior")
        self._reads = kind in ("hidden", "both")
        self._chunk = own.capacity.chunk_tokens
        self.late = 0
        self._parted: dict[str, Parted] = {}

    # ------------------------------------------------------------ until it is on offer

    def arrived(self, job: Job) -> list[Action]:
        """Ask at once: the answer may take its time. Not where the request itself says how long it will be."""
        if self.foresight is None:
            job.predicted = not self._predicts
        elif job.sampling.ignore_eos or not job.decodes:
            self.dispatcher.settle(job, self._without(job))
        else:
            job.predicted = False
        job.answered = job.predicted or not self._asked(job)
        return [] if job.answered else [Predict(job.key, job.prompt, job.sampling)]

    def _asked(self, job: Job) -> bool:
        """Of both kinds the classifier is asked of those alone whose own state comes too late for the offer."""
        return self._asks and not (self._reads and job.goal <= self._chunk)

    def started(self, job: Job, planned: Iterable[Span]) -> None:
        """Its leg goes to the engine, for the next chunk as `planned`, if there is room for it."""
        if job.predicted or self._asked(job):
            return
        if self._reads and any(span.key == job.key and span.stop == job.goal for span in planned):
            return
        self.dispatcher.settle(job, self._without(job))

    def due(self, job: Job, now: float) -> list[Action]:
        """Its timer is due: it goes on without a prediction, or its offer is repeated."""
        if job.predicted:
            return self.dispatcher.repeat(job, now)
        self._late(job)
        return self.dispatcher.dispatch(now)

    def stepped(self, planned: Sequence[Span], foretold: Sequence[Foretold], now: float) -> list[Action]:
        """A step is over. Whose prompt is computed waits no longer, nor does who was to be computed in one chunk and
        was not."""
        if not self._predicts:
            return []
        jobs, actions, waited = self.dispatcher.jobs, list[Action](), False
        for told in foretold:
            if told.key in jobs:
                waited |= not jobs[told.key].predicted
                actions += self._foretold(jobs[told.key], told)
        for span in planned:
            job = jobs.get(span.key)
            if job is None or job.predicted or not job.decodes:
                continue
            if job.token is not None:
                self._late(job)
            elif not self._asked(job):
                self.dispatcher.settle(job, self._without(job))
            waited |= job.predicted
        return [*actions, *self.dispatcher.dispatch(now)] if waited else actions

    # ------------------------------------------------------------ what is said of it

    def known(self, event: LengthKnown, now: float) -> list[Action]:
        """The answer to `Predict`."""
        job = self.dispatcher.jobs.get(event.key)
        if job is None:
            return self._known_of_parted(event)
        job.answered = True
        if job.told:
            return []  # its hidden state has said more
        length = None if event.length is None else moved_up(event.length, len(job.output))
        if self.foresight is not None and event.odds is not None:
            length = self.foresight.named(job.rid, event.odds, job.sampling, len(job.output))
        if job.predicted:  # by what was known without it
            return [] if length is None or self.foresight is None else self.dispatcher.correct(job, length)
        if length is None and self.foresight is not None:
            self._late(job)
        else:
            self.dispatcher.settle(job, length)
        return self.dispatcher.dispatch(now)

    def _known_of_parted(self, event: LengthKnown) -> list[Action]:
        """The answer comes after the prompt was handed over, and goes to whoever decodes it."""
        parted = self._parted.pop(event.key, None)
        if parted is None or self.foresight is None or event.odds is None:
            return []
        length = self.foresight.named(parted.address["rid"], event.odds, parted.sampling, parted.outputs)
        return [Send(parted.target, Foreseen(**parted.address, length=length))]

    def _foretold(self, job: Job, told: Foretold) -> list[Action]:
        if self.foresight is None:
            return []
        job.told = True
        length = self.foresight.foretold(job.rid, told, job.sampling)
        if job.predicted:
            return self.dispatcher.correct(job, length)
        self.dispatcher.settle(job, length)
        return []

    def closed(self, message: Close) -> None:
        """A request is over: what it wrote, if it ended by itself, or nothing that could be learnt from."""
        if self.foresight is None:
            return
        key = f"p:{message.rid}:{message.attempt}"
        if not message.reason:  # it goes on elsewhere, or as another attempt
            self._part(self.dispatcher.jobs.get(key))
            return
        self._parted.pop(key, None)
        if message.outputs:
            self.foresight.ended(message.rid, message.outputs, message.reason)
        else:
            self.foresight.forget(message.rid)

    def _part(self, job: Job | None) -> None:
        """Remember it, if its answer is still to come and may be of use to whoever decodes it."""
        if job is None or job.answered or job.told or job.flow.offer is None:
            return
        address = self.dispatcher.address(job)
        self._parted[job.key] = Parted(job.flow.target, address, job.sampling, len(job.output))
        while len(self._parted) > MOST_PARTED:
            del self._parted[next(iter(self._parted))]

    def _without(self, job: Job) -> LengthRange | None:
        """What is known of it without a prediction."""
        return None if self.foresight is None else self.foresight.unknown(job.sampling, len(job.output))

    def _late(self, job: Job) -> None:
        self.late += 1
        if self.foresight is not None:
            self.foresight.late()
        self.dispatcher.settle(job, self._without(job))
