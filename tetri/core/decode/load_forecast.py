"""What the requests at a decode instance are predicted to take until they have ended."""

from __future__ import annotations

from collections.abc import Iterable

from tetri.core.actions import Broken
from tetri.core.decode.request import NEVER, DecodeRequest
from tetri.core.instance.identity import Identity
from tetri.core.length.estimator import LengthEstimator
from tetri.policy.length import end_of, heavy, moved_up
from tetri.request import LengthRange, blocks_for


class LoadForecast:
    """Sums over the seats that wait or run, kept as these come, grow and go, so that a load report costs nothing.

    heavy     those predicted to be heavy decodes
    growth    blocks that all are predicted to take in addition
    left      output tokens that all are predicted to write yet
    context   tokens, prompts and outputs

    Who outlives its range gets another: with a `estimator` that of those who went on as far, else the next one of the
    same width.
    """

    def __init__(self, own: Identity, estimator: LengthEstimator | None = None) -> None:
        self.own, self.estimator = own, estimator
        self.requests = self.heavy = self.growth = self.left = self.context = 0

    def enter(self, request: DecodeRequest) -> None:
        self.requests += 1
        self.context += request.size
        self._predict(request)
        self._count(request, 1)

    def leave(self, request: DecodeRequest) -> None:
        self._count(request, -1)
        self.context -= request.size
        self.requests -= 1

    def wrote(self, tokens: int) -> None:
        """So many more tokens, of any of them."""
        self.context += tokens
        self.left -= tokens

    def grown(self, request: DecodeRequest, blocks: int) -> None:
        """Its account has so many blocks now."""
        request.blocks = blocks
        self.growth -= request.growth
        self._grow(request)
        self.growth += request.growth

    def update_length(self, request: DecodeRequest, length: LengthRange) -> None:
        """This is predicted of it from now on."""
        self._count(request, -1)
        request.length = length
        self._predict(request)
        self._count(request, 1)

    def look(self, request: DecodeRequest) -> bool:
        """Predict again if it has outlived what was predicted. Whether its range was moved up."""
        if request.written < request.dispatch_end and (request.length is None or request.written < request.length.high):
            return False
        before = request.length
        self._count(request, -1)
        self._predict(request)
        self._count(request, 1)
        return request.length is not before

    def until_moved(self, request: DecodeRequest) -> int:
        """Tokens that it writes until its range is moved up."""
        return NEVER if request.length is None else request.length.high - request.written

    def decode_s(self) -> float:
        """Predicted seconds until all have ended, as if they ended together: the tokens that are left, shared by the
        batch that they make now. Not the longest one's, for the question is when there is room for more."""
        batch = min(self.requests, self.own.capacity.max_batch)
        if not batch:
            return 0.0
        return self.own.cost.decode_run_s(batch, self.context * batch // self.requests, -(-self.left // batch))

    def _predict(self, request: DecodeRequest) -> None:
        """A request that goes on writes one more token at least. One that outlives the end of its range that the
        dispatcher reckons with is predicted by the high end from then on."""
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
        self._grow(request)

    def _grow(self, request: DecodeRequest) -> None:
        blocks = blocks_for(len(request.offer.prompt) + request.dispatch_end, self.own.capacity.block_tokens)
        request.growth = max(blocks - request.blocks, 0)
        high = NEVER if request.length is None else request.length.high
        account_tokens = request.blocks * self.own.capacity.block_tokens - len(request.offer.prompt) + 1
        request.due = min(high, request.dispatch_end, account_tokens) - len(request.offer.output)

    def _count(self, request: DecodeRequest, sign: int) -> None:
        self.heavy += sign * request.heavy
        self.growth += sign * request.growth
        self.left += sign * (request.dispatch_end - request.written)

    def check(self, requests: Iterable[DecodeRequest]) -> None:
        """Count everything again."""
        now = (self.requests, self.heavy, self.growth, self.left, self.context)
        again = LoadForecast(self.own)
        for request in requests:
            again.requests += 1
            again.context += request.size
            again._count(request, 1)
            if request.tokens and not request.written < request.dispatch_end:
                raise Broken(f"{request.key} has outlived its prediction of {request.dispatch_end} tokens")
            if request.tokens and request.length is not None and not request.written < request.length.high:
                raise Broken(f"{request.key} has {request.written} tokens and its range is {request.length}")
        counted = (again.requests, again.heavy, again.growth, again.left, again.context)
        if now != counted:
            raise Broken(f"seats, heavy, growth, left, context are {now}, counted {counted}")
