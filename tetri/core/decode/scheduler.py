"""The decode scheduler of a worker: KV has landed -> wait -> admit -> tokens. `hand_overs.py` brings the KV here.

A request stays, with its tokens, until the broker closes it: until then the broker can ask for them again.
"""

from __future__ import annotations

from tetri.core.actions import Action, AdmitRequest
from tetri.core.decode.batch import Batch
from tetri.core.decode.hand_overs import HandOvers, staged
from tetri.core.decode.load_forecast import LoadForecast
from tetri.core.decode.migration import Migrations
from tetri.core.decode.request import DecodeRequest
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.core.instance.peers import Peers
from tetri.core.length.estimator import LengthEstimator
from tetri.cost import CorrectedCost
from tetri.engine_request import HiddenStateEstimate, StepDone
from tetri.request import Stage, token_ids
from tetri.wire.messages import End, Hold, Resend, TokenItem, Tokens


class DecodeScheduler:
    """Schedules the decode phase. `requests`: those of `hand_overs`.

    `estimator` is the worker's, None unless lengths are "trained"."""

    def __init__(
        self,
        own: Identity,
        ledger: Ledger,
        peers: Peers,
        estimator: LengthEstimator | None,
        activity: ActivityLog,
        cost: CorrectedCost,
    ) -> None:
        self.own, self.estimator, self.activity = own, estimator, activity
        self.forecast = LoadForecast(own, cost, estimator)
        self.batch = Batch(own, ledger, self.forecast, activity)
        self.hand_overs = HandOvers(own, ledger, peers, self.batch, activity)
        self.migrations = Migrations(own, peers, self.batch, activity)
        self.requests = self.hand_overs.requests

    # ------------------------------------------------------------ running

    def admit(self, most: int) -> list[Action]:
        """Admit landed requests to the batch, up to `most` in all."""
        admitted = self.batch.admit(most)
        return [action for request in admitted for action in self._admitted(request)] if admitted else []

    def admit_lone(self) -> list[Action]:
        """Admit the request that the next step computes alone, unless it is in the batch already."""
        return [action for request in self.batch.admit_lone() for action in self._admitted(request)]

    def _admitted(self, request: DecodeRequest) -> list[Action]:
        first, *further = token_ids(request.tokens[len(request.offer.written) :])
        admit = AdmitRequest(request.key, first, tuple(further))
        return [admit, staged(self.own, request, Stage.DECODE)]

    def steps(self) -> bool:
        """Return whether the engine has a token to compute or blocks to allocate."""
        return bool(self.batch.running or self.hand_overs.unallocated)

    def stuck(self) -> bool:
        """Return whether no request can run, while a landed one could be admitted."""
        return self.batch.stuck() and bool(self.batch.landed)

    def step_done(self, done: StepDone) -> list[Action]:
        """Report the tokens of a step, and fetch the chunks of requests that have their blocks now."""
        actions: list[Action] = []
        for key in done.allocated:
            actions += self.hand_overs.allocated(key)
        items, ended = self.batch.step_done(done)
        for request, end in ended:
            self._finish(request, end)
        if not items:
            return actions
        return [self.own.report(Tokens, items=items, step=self.activity.step), *actions]

    def _finish(self, request: DecodeRequest, end: End) -> None:
        self.hand_overs.leave(request)
        if end.error is None:
            self.forecast.learn(request.written)
        if self.estimator is not None and end.error is not None:
            self.estimator.forget(request.offer.rid)
        elif self.estimator is not None and not request.offer.sampling.ignore_eos:
            self.estimator.ended(request.offer.rid, request.written, end.reason)
        request.end = end

    def estimates(self, estimate: HiddenStateEstimate) -> None:
        """Update the length range of a running request from its hidden state, unless its length is fixed."""
        request = self.batch.running.get(estimate.key)
        assert self.estimator is not None
        if request is not None and not request.offer.sampling.ignore_eos:
            request.estimated = True
            length = self.estimator.estimates(request.offer.rid, estimate, request.offer.sampling)
            self.batch.update_length(request, length)

    # ------------------------------------------------------------ reports

    def resend(self, message: Resend) -> list[Action]:
        """Send the output tokens from index `message.start` on again, also those that were not due yet."""
        request = self.hand_overs.granted(message.rid, message.attempt)
        if request is None:
            return []
        ids = request.outputs()[message.start :]
        item = TokenItem(request.offer.rid, request.offer.attempt, message.start, ids, request.end)
        if request.running:
            self.batch.mark_sent(request)
        return [self.own.report(Tokens, items=[item])] if ids or request.end else []

    def holds(self) -> list[Hold]:
        """Return the requests for the heartbeat. `outputs` counts sent tokens only, so that the broker asks again only
        for lost ones."""
        requests = self.requests.values()
        held = [(each, each.offer) for each in requests if each.landed_as or not each.stays]  # its prefill lists it
        return [Hold(offer.rid, offer.attempt, each.stage, len(offer.output) + each.sent) for each, offer in held]

    def waiting(self) -> int:
        """Return the number of requests that do not run yet."""
        return self.forecast.requests - len(self.batch.running)

    def tpot_limits(self) -> list[float | None]:
        """Return the limit of TPOT of each request that has not ended."""
        return [request.offer.tpot_s for request in self.requests.values() if request.end is None]

    def check(self) -> None:
        """Raise Broken when hand-overs, requests, batch, ledger, indexes and forecast disagree."""
        self.batch.check()
        self.hand_overs.check()
        self.migrations.check()
