"""The load forecast of a decode instance: the memory and time that its requests need until they end."""

from __future__ import annotations

from collections.abc import Iterable

from tetri.core.actions import Broken
from tetri.core.decode.request import NEVER, DecodeRequest
from tetri.core.instance.identity import Identity
from tetri.core.length.estimator import LengthEstimator
from tetri.cost import CorrectedCost
from tetri.policy.length import end_of, heavy, moved_up
from tetri.request import LengthRange, blocks_for

LEARNED = 0.05  # weight of the newest output in the mean length of outputs


class LoadForecast:
    """Sums over all open decode requests. They are updated with every change, so that a load report costs nothing.

    requests  open requests
    heavy     requests that are predicted to be heavy decodes
    growth    blocks that all requests are predicted to need in addition
    left      output tokens that all requests are predicted to write from now on
    ended, ended_tokens  requests that have ended here, ever, and their output tokens
    usual_output  mean length of the outputs that have ended here lately, in tokens; 0 before the first
    context   tokens of all prompts and outputs

    A request that writes more than its length range gets a new one: with an `estimator`, from requests that got at
    least this far, otherwise the next range of the same width.
    """

    def __init__(self, own: Identity, cost: CorrectedCost, estimator: LengthEstimator | None = None) -> None:
        self.own, self.cost, self.estimator = own, cost, estimator
        self.requests = self.heavy = self.growth = self.left = self.context = 0
        self.ended = self.ended_tokens = 0
        self.usual_output = 0.0

    def enter(self, request: DecodeRequest) -> None:
        """Add a request and predict it."""
        self.requests += 1
        self.context += request.size
        self._predict(request)
        self._add(request, 1)

    def leave(self, request: DecodeRequest) -> None:
        """Remove a request."""
        self._add(request, -1)
        self.context -= request.size
        self.requests -= 1

    def learn(self, tokens: int) -> None:
        """Learn from an output that has ended with so many tokens."""
        self.ended += 1
        self.ended_tokens += tokens
        self.usual_output += (tokens - self.usual_output) * (LEARNED if self.usual_output else 1.0)

    def wrote(self, tokens: int) -> None:
        """Count new output tokens, of whichever requests."""
        self.context += tokens
        self.left -= tokens

    def grown(self, request: DecodeRequest, blocks: int) -> None:
        """Record that the account of a request has `blocks` blocks now."""
        fewer = min(blocks - request.blocks, request.growth)
        request.blocks = blocks
        request.growth -= fewer
        self.growth -= fewer
        self._set_due(request)

    def update_length(self, request: DecodeRequest, length: LengthRange) -> None:
        """Set a new length range of a request."""
        self._add(request, -1)
        request.length = length
        self._predict(request)
        self._add(request, 1)

    def look(self, request: DecodeRequest) -> bool:
        """Predict a request again if it has written as much as predicted. Return whether its length range changed."""
        if request.written < request.dispatch_end and (request.length is None or request.written < request.length.high):
            return False
        before = request.length
        self._add(request, -1)
        self._predict(request)
        self._add(request, 1)
        return request.length is not before

    def until_moved(self, request: DecodeRequest) -> int:
        """Return how many tokens a request may write before its length range ends."""
        return NEVER if request.length is None else request.length.high - request.written

    def step_s(self) -> float:
        """Return the predicted seconds of a decode step of all requests."""
        return self.cost.decode_s(self.requests, self.context)

    def decode_s(self) -> float:
        """Return the predicted seconds until all requests have ended, as if they shared the remaining tokens evenly.
        The longest request alone does not matter: callers ask when this instance can serve more requests."""
        batch = min(self.requests, self.own.capacity.max_batch)
        if not batch:
            return 0.0
        return self.cost.decode_run_s(batch, self.context * batch // self.requests, -(-self.left // batch))

    def _predict(self, request: DecodeRequest) -> None:
        """Set the predicted ends of a request, at least one token from now. Once it has written more than the end
        that `rules.dispatch_end` names, predict it by the high end of its range."""
        rules, most = self.own.rules, request.offer.sampling.max_tokens
        least = max(request.written, len(request.offer.output) + 1) + 1
        if request.length is not None:
            if self.estimator is None:
                request.length = moved_up(request.length, least - 1)
            elif request.length.high < least:
                request.length = self.estimator.unknown(request.offer.sampling, least - 1)
        end = end_of(request.length, rules.dispatch_end, most)
        request.dispatch_end = end if end >= least else max(end_of(request.length, "high", most), least)
        request.admit_end = end_of(request.length, rules.admit_end, most)
        request.heavy = heavy(request.length, rules.heavy_tokens, most)
        self._set_growth(request)

    def _set_growth(self, request: DecodeRequest) -> None:
        blocks = blocks_for(len(request.offer.prompt) + request.dispatch_end, self.own.capacity.block_tokens)
        request.growth = max(blocks - request.blocks, 0)
        self._set_due(request)

    def _set_due(self, request: DecodeRequest) -> None:
        high = NEVER if request.length is None else request.length.high
        account_tokens = request.blocks * self.own.capacity.block_tokens - len(request.offer.prompt) + 1
        request.due = min(high, request.dispatch_end, account_tokens) - len(request.offer.output)

    def _add(self, request: DecodeRequest, sign: int) -> None:
        self.heavy += sign * request.heavy
        self.growth += sign * request.growth
        self.left += sign * (request.dispatch_end - request.written)

    def check(self, requests: Iterable[DecodeRequest]) -> None:
        """Raise Broken when a sum is wrong or a request has written more than predicted."""
        now = (self.requests, self.heavy, self.growth, self.left, self.context)
        fresh = LoadForecast(self.own, self.cost)
        for request in requests:
            fresh.requests += 1
            fresh.context += request.size
            fresh._add(request, 1)
            if request.tokens and not request.written < request.dispatch_end:
                raise Broken(f"{request.key} has outlived its prediction of {request.dispatch_end} tokens")
            if request.tokens and request.length is not None and not request.written < request.length.high:
                raise Broken(f"{request.key} has {request.written} tokens and its range is {request.length}")
        counted = (fresh.requests, fresh.heavy, fresh.growth, fresh.left, fresh.context)
        if now != counted:
            raise Broken(f"requests, heavy, growth, left, context are {now}, counted {counted}")
