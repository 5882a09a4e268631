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
after the Offer corrects it (LengthUpdate), even when the prompt is long handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tetri.core.actions import Action, LengthKnown, Predict, Send
from tetri.core.instance.identity import Identity
from tetri.core.length.estimator import LengthEstimator
from tetri.core.prefill.dispatcher import Dispatcher
from tetri.core.prefill.request import PrefillRequest
from tetri.engine_request import HiddenStateEstimate, Span
from tetri.policy.length import moved_up
from tetri.request import LengthRange, Sampling
from tetri.wire.handover import LengthUpdate
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


class LengthWait:
    """Works on the dispatcher's jobs. `estimator` is None unless lengths are learnt. `late` counts the jobs that went
    on before their prediction had come."""

    def __init__(self, own: Identity, dispatcher: Dispatcher, estimator: LengthEstimator | None) -> None:
        """Raises ValueError when lengths are to be learnt and nothing says from what."""
        if own.rules.length == "trained" and own.expected is None:
            raise ValueError(f'{own.iid}: length = "trained" needs what is expected before any traffic')
        self.dispatcher, self.estimator = dispatcher, estimator
        kind = "" if own.expected is None or estimator is None else own.expected.kind
        self._predicts = own.rules.length != "none"
        self._asks = self._predicts and kind not in ("hidden", "prior")
        self._reads = kind in ("hidden", "both")
        self._chunk = own.capacity.chunk_tokens
        self.late = 0
        self._parted: dict[str, Parted] = {}

    # ------------------------------------------------------------ until it is on offer

    def arrived(self, request: PrefillRequest) -> list[Action]:
        """Ask at once: the answer may take its time. Not where the request itself says how long it will be."""
        if self.estimator is None:
            request.predicted = not self._predicts
        elif request.sampling.ignore_eos or not request.decodes:
            self.dispatcher.settle(request, self._without(request))
        else:
            request.predicted = False
        request.answered = request.predicted or not self._asked(request)
        return [] if request.answered else [Predict(request.key, request.prompt, request.sampling)]

    def _asked(self, request: PrefillRequest) -> bool:
        """Of both kinds the classifier is asked of those alone whose own state comes too late for the offer."""
        return self._asks and not (self._reads and request.goal <= self._chunk)

    def started(self, request: PrefillRequest, planned: Iterable[Span]) -> None:
        """Its leg goes to the engine, for the next chunk as `planned`, if there is room for it."""
        if request.predicted or self._asked(request):
            return
        if self._reads and any(span.key == request.key and span.stop == request.goal for span in planned):
            return
        self.dispatcher.settle(request, self._without(request))

    def due(self, request: PrefillRequest, now: float) -> list[Action]:
        """Its timer is due: it goes on without a prediction, or its offer is repeated."""
        if request.predicted:
            return self.dispatcher.repeat(request, now)
        self._late(request)
        return self.dispatcher.dispatch(now)

    def stepped(self, planned: Sequence[Span], estimates: Sequence[HiddenStateEstimate], now: float) -> list[Action]:
        """A step is over. Whose prompt is computed waits no longer, nor does who was to be computed in one chunk and
        was not."""
        if not self._predicts:
            return []
        requests, actions, waited = self.dispatcher.requests, list[Action](), False
        for estimate in estimates:
            if estimate.key in requests:
                waited |= not requests[estimate.key].predicted
                actions += self._estimated(requests[estimate.key], estimate)
        for span in planned:
            request = requests.get(span.key)
            if request is None or request.predicted or not request.decodes:
                continue
            if request.token is not None:
                self._late(request)
            elif not self._asked(request):
                self.dispatcher.settle(request, self._without(request))
            waited |= request.predicted
        return [*actions, *self.dispatcher.dispatch(now)] if waited else actions

    # ------------------------------------------------------------ what is said of it

    def known(self, event: LengthKnown, now: float) -> list[Action]:
        """The answer to `Predict`."""
        request = self.dispatcher.requests.get(event.key)
        if request is None:
            return self._known_of_parted(event)
        request.answered = True
        if request.estimated:
            return []  # its hidden state has said more
        length = None if event.length is None else moved_up(event.length, len(request.output))
        if self.estimator is not None and event.distribution is not None:
            length = self.estimator.named(request.rid, event.distribution, request.sampling, len(request.output))
        if request.predicted:  # by what was known without it
            return [] if length is None or self.estimator is None else self.dispatcher.correct(request, length)
        if length is None and self.estimator is not None:
            self._late(request)
        else:
            self.dispatcher.settle(request, length)
        return self.dispatcher.dispatch(now)

    def _known_of_parted(self, event: LengthKnown) -> list[Action]:
        """The answer comes after the prompt was handed over, and goes to whoever decodes it."""
        parted = self._parted.pop(event.key, None)
        if parted is None or self.estimator is None or event.distribution is None:
            return []
        length = self.estimator.named(parted.address["rid"], event.distribution, parted.sampling, parted.outputs)
        return [Send(parted.target, LengthUpdate(**parted.address, length=length))]

    def _estimated(self, request: PrefillRequest, estimate: HiddenStateEstimate) -> list[Action]:
        if self.estimator is None:
            return []
        request.estimated = True
        length = self.estimator.estimates(request.rid, estimate, request.sampling)
        if request.predicted:
            return self.dispatcher.correct(request, length)
        self.dispatcher.settle(request, length)
        return []

    def closed(self, message: Close) -> None:
        """A request is over: what it wrote, if it ended by itself, or nothing that could be learnt from."""
        if self.estimator is None:
            return
        key = f"p:{message.rid}:{message.attempt}"
        if not message.reason:  # it goes on elsewhere, or as another attempt
            self._part(self.dispatcher.requests.get(key))
            return
        self._parted.pop(key, None)
        if message.outputs:
            self.estimator.ended(message.rid, message.outputs, message.reason)
        else:
            self.estimator.forget(message.rid)

    def _part(self, request: PrefillRequest | None) -> None:
        """Remember it, if its answer is still to come and may be of use to whoever decodes it."""
        if request is None or request.answered or request.estimated or request.flow.offer is None:
            return
        address = self.dispatcher.address(request)
        self._parted[request.key] = Parted(request.flow.target, address, request.sampling, len(request.output))
        while len(self._parted) > MOST_PARTED:
            del self._parted[next(iter(self._parted))]

    def _without(self, request: PrefillRequest) -> LengthRange | None:
        """What is known of it without a prediction."""
        return None if self.estimator is None else self.estimator.unknown(request.sampling, len(request.output))

    def _late(self, request: PrefillRequest) -> None:
        self.late += 1
        if self.estimator is not None:
            self.estimator.late()
        self.dispatcher.settle(request, self._without(request))
