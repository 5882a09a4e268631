"""Length predictions of the queued prompts: which predictor is asked, how long an offer waits for the answer, and how a
later answer corrects it (paper, section 3.3.2).

With `length = "trained"` the kind of predictor decides where predictions come from:

    classifier  is asked when the prompt arrives, and answers some time later
    hidden      the model's own hidden state at the end of the prompt, known after the step with the last chunk
    both        as hidden; a prompt of several chunks uses the classifier's answer until its last chunk is computed
    prior       the lengths of all requests that ended here; no predictor is asked

An offer contains the best prediction that is there. It waits for a better one only while that costs little: for the
classifier `length_wait_s` at most, and never past the prompt's last chunk; for the hidden state only when the very next
chunk completes the prompt. A prompt of several chunks does not wait for it, because its KV could already leave. An
answer after the Offer corrects it (LengthUpdate), even after the hand-over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tetri.core.actions import Action, LengthKnown, Predict, Send
from tetri.core.instance.identity import Identity
from tetri.core.length.estimator import LengthEstimator
from tetri.core.prefill.dispatcher import Dispatcher
from tetri.core.prefill.request import PrefillRequest, key_of
from tetri.engine_request import HiddenStateEstimate, Span
from tetri.policy.length import moved_up
from tetri.request import LengthRange, Sampling
from tetri.wire.handover import LengthUpdate
from tetri.wire.messages import Close

#: Handed-over requests whose classifier answer is still awaited, at most; the oldest are forgotten.
MOST_PARTED = 256


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A request that now decodes on `target`, where `address` identifies its offer. `outputs`: output tokens of earlier
    attempts."""

    target: str
    address: dict[str, Any]
    sampling: Sampling
    outputs: int


class LengthWait:
    """Sets the lengths of the dispatcher's requests. `estimator` is None unless lengths are "trained". `late` counts
    the requests that were offered before their prediction arrived."""

    def __init__(self, own: Identity, dispatcher: Dispatcher, estimator: LengthEstimator | None) -> None:
        """Raise ValueError when lengths are "trained" but no prior is given."""
        if own.rules.length == "trained" and own.expected is None:
            raise ValueError(f'{own.iid}: length = "trained" needs what is expected before any traffic')
        self.dispatcher, self.estimator = dispatcher, estimator
        kind = "" if own.expected is None or estimator is None else own.expected.kind
        self._predicts = own.rules.length != "none"
        self._has_classifier = self._predicts and kind not in ("hidden", "prior")
        self._has_hidden = kind in ("hidden", "both")
        self._chunk_tokens = own.capacity.chunk_tokens
        self.late = 0
        self._handed_over: dict[str, HandedOver] = {}
        self._places = False  # a length became known in the step under way, or by it

    # ------------------------------------------------------------ until it is on offer

    def arrived(self, request: PrefillRequest) -> list[Action]:
        """Ask for a prediction as soon as the request arrives, unless its sampling parameters fix the length. A canary
        needs none."""
        if self.estimator is None:
            request.predicted = not self._predicts or bool(request.pinned)
        elif request.sampling.ignore_eos or not request.decodes:
            self.dispatcher.settle(request, self._unpredicted(request))
        else:
            request.predicted = False
        request.answered = request.predicted or not self._asks(request)
        return [] if request.answered else [Predict(request.key, request.prompt, request.sampling)]

    def _asks(self, request: PrefillRequest) -> bool:
        """Return whether the classifier is asked. With both kinds, only for prompts of several chunks: their hidden
        state comes too late for the offer."""
        return self._has_classifier and not (self._has_hidden and request.goal <= self._chunk_tokens)

    def started(self, request: PrefillRequest, planned: Iterable[Span]) -> None:
        """Settle the length of a starting request without a prediction, unless one is on its way: the classifier's, or
        that of its hidden state when the `planned` chunk completes the prompt. On an adaptive instance it waits for
        none: it can only stay while its prefill runs."""
        if request.predicted:
            return
        if self.dispatcher.adapts():
            self.dispatcher.settle(request, self._unpredicted(request))
            return
        if self._asks(request):
            return
        if self._has_hidden and any(span.key == request.key and span.stop == request.goal for span in planned):
            return
        self.dispatcher.settle(request, self._unpredicted(request))

    def due(self, request: PrefillRequest, now: float) -> list[Action]:
        """Handle the request's timer: offer it without a prediction, or repeat its offer."""
        if request.predicted:
            return self.dispatcher.due(request, now)
        self._settle_late(request)
        return self.dispatcher.dispatch(now)

    def stepped(self, planned: Sequence[Span], estimates: Sequence[HiddenStateEstimate]) -> list[Action]:
        """Apply the hidden-state estimates of a step. Requests whose prompt is computed now wait no longer, nor do
        those that the `planned` chunk was to complete and did not. `place` offers them."""
        actions: list[Action] = []
        if not self._predicts:
            return actions
        requests = self.dispatcher.requests
        for estimate in estimates:
            if estimate.key in requests:
                self._places |= not requests[estimate.key].predicted
                actions += self._apply_estimate(requests[estimate.key], estimate)
        for span in planned:
            request = requests.get(span.key)
            if request is None or request.predicted or not request.decodes:
                continue
            if request.computed:
                self._settle_late(request)
            elif not self._asks(request):
                self.dispatcher.settle(request, self._unpredicted(request))
            self._places |= request.predicted
        return actions

    def place(self, now: float) -> list[Action]:
        """Offer the requests whose length became known in the last step."""
        places, self._places = self._places, False
        return self.dispatcher.dispatch(now) if places else []

    # ------------------------------------------------------------ predictions

    def known(self, event: LengthKnown, now: float, *, stepping: bool) -> list[Action]:
        """Handle the answer to `Predict`. While the engine is `stepping`, no request can be made to stay in it: if some
        could, they are placed after the step."""
        request = self.dispatcher.requests.get(event.key)
        if request is None:
            return self._known_after_hand_over(event)
        request.answered = True
        if request.estimated:
            return []  # the hidden state knows more than the classifier
        length = None if event.length is None else moved_up(event.length, len(request.output))
        if self.estimator is not None and event.distribution is not None:
            length = self.estimator.named(request.lead.rid, event.distribution, request.sampling, len(request.output))
        if request.predicted:  # the offer did not wait for this answer
            return [] if length is None or self.estimator is None else self.dispatcher.correct(request, length)
        if length is None and self.estimator is not None:
            self._settle_late(request)
        else:
            self.dispatcher.settle(request, length)
        if stepping and self.dispatcher.decodes_here:
            self._places = True
            return []
        return self.dispatcher.dispatch(now)

    def _known_after_hand_over(self, event: LengthKnown) -> list[Action]:
        """Send an answer that comes after the hand-over to the decode instance."""
        known = self._handed_over.pop(event.key, None)
        if known is None or self.estimator is None or event.distribution is None:
            return []
        length = self.estimator.named(known.address["rid"], event.distribution, known.sampling, known.outputs)
        return [Send(known.target, LengthUpdate(**known.address, length=length))]

    def _apply_estimate(self, request: PrefillRequest, estimate: HiddenStateEstimate) -> list[Action]:
        if self.estimator is None:
            return []
        request.estimated = True
        length = self.estimator.estimates(request.lead.rid, estimate, request.sampling)
        if request.predicted:
            return self.dispatcher.correct(request, length)
        self.dispatcher.settle(request, length)
        return []

    def closed(self, message: Close) -> None:
        """Learn the length of a request that has ended by itself. Forget one that was cancelled or failed."""
        if self.estimator is None:
            return
        key = key_of(message.rid, message.attempt)
        if not message.reason:  # it continues on another instance, or as another attempt
            self._remember(self.dispatcher.requests.get(key))
            return
        self._handed_over.pop(key, None)
        if message.outputs:
            self.estimator.ended(message.rid, message.outputs, message.reason)
        else:
            self.estimator.forget(message.rid)

    def _remember(self, request: PrefillRequest | None) -> None:
        """Remember a handed-over request whose answer is still awaited, and useful to its decode instance."""
        if request is None or request.answered or request.estimated or request.flow.offer is None:
            return
        address = self.dispatcher.address(request)
        self._handed_over[request.key] = HandedOver(request.flow.target, address, request.sampling, len(request.output))
        while len(self._handed_over) > MOST_PARTED:
            del self._handed_over[next(iter(self._handed_over))]

    def _unpredicted(self, request: PrefillRequest) -> LengthRange | None:
        """Return the length range without a prediction: the prior's, or None (unknown)."""
        return None if self.estimator is None else self.estimator.unknown(request.sampling, len(request.output))

    def _settle_late(self, request: PrefillRequest) -> None:
        self.late += 1
        if self.estimator is not None:
            self.estimator.late()
        self.dispatcher.settle(request, self._unpredicted(request))
