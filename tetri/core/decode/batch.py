"""The running batch of a decode instance: who is admitted, how far a step goes, and the tokens that come out."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.core.actions import Broken
from tetri.core.decode.load_forecast import LoadForecast
from tetri.core.decode.request import NEVER, DecodeRequest
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.engine_request import Sampled, Span
from tetri.policy.rules import ADMISSIONS, KEPT_FREE
from tetri.policy.views import BatchMember, BatchView, WaitingRequest
from tetri.request import LengthRange, blocks_for
from tetri.wire.messages import End, TokenItem

Ended = list[tuple[DecodeRequest, End]]


class Batch:
    """`landed` wait for admission, `running` are in the batch, both by key. `preempted` were preempted, and their KV is
    not all computed again."""

    def __init__(self, own: Identity, ledger: Ledger, forecast: LoadForecast) -> None:
        self.own, self.ledger, self.forecast = own, ledger, forecast
        self.landed: dict[str, DecodeRequest] = {}
        self.running: dict[str, DecodeRequest] = {}
        self.preempted: dict[str, DecodeRequest] = {}
        self._landings = 0
        self._stuck = False  # the last step ran none of the batch: all are preempted, and wait for memory
        self._ask = False  # something has changed since the admission policy was last asked
        self._asked = (0, 0)  # free blocks then, and how large the batch might be
        self._until = 0  # steps until the first range is moved up, at most; 0: count again
        self._kept: int | None = None  # blocks to be kept free; None: the batch has changed since they were counted

    # ------------------------------------------------------------ who is in it

    def land(self, request: DecodeRequest, token: int) -> None:
        """All its KV is here, and the first token, which the prefill side has told of."""
        self._landings += 1
        request.landed_as = self._landings
        request.tokens.append(token)
        request.sent = 1
        self.forecast.wrote(1)
        self.landed[request.key] = request
        self._ask = True

    def leave(self, request: DecodeRequest) -> None:
        """It has ended, or nobody wants it any more."""
        request.running = False
        for place in (self.landed, self.running, self.preempted):
            place.pop(request.key, None)
        self._ask, self._until, self._kept = True, 0, None

    def admit(self, most: int) -> list[DecodeRequest]:
        """Let landed seats into the batch of up to `most`. If nothing runs, the oldest goes whatever the policy says:
        the engine can take the memory of those in the batch for another, but not of those that wait.

        The policy is asked when the batch, a range or the free memory has changed. Between such moments every member
        grows as was predicted, so the answer would be the same; and steps may be taken many in one go."""
        alone = not self.running or self._stuck
        free, larger = self._asked
        if not self.landed or not (alone or self._ask or self.ledger.free > free or most > larger):
            return []
        keys = self._policy(most) if len(self.running) < most else []
        if not keys and alone:
            keys = [next(iter(self.landed))]
        for key in keys:
            request = self.running[key] = self.landed.pop(key)
            request.running = True
            self.ledger.run(key)
            self._grow(request)
            self._mark(request)
        self._ask, self._until, self._asked, self._kept = False, 0, (self.ledger.free, most), None
        return [self.running[key] for key in keys]

    def kept_free(self) -> int:
        """Blocks that no request may be granted: those in the batch were admitted because they will have them. Counted
        once between two steps, since many requests may ask meanwhile, and what they are granted was free."""
        if self._kept is None:
            kept = KEPT_FREE.get(self.own.rules.admit)
            self._kept = 0 if kept is None else kept(self._view(self.own.capacity.max_batch))
        return self._kept

    def _view(self, most: int) -> BatchView:
        members = [_member(request) for request in self.running.values()]
        return BatchView(members, most, self.ledger.free, self.own.capacity.block_tokens)

    def _policy(self, most: int) -> list[str]:
        waiting = [
            WaitingRequest(key, request.landed_as, request.flow.blocks, request.size, _end(request))
            for key, request in self.landed.items()
        ]
        return ADMISSIONS[self.own.rules.admit](waiting, self._view(most))

    def stuck(self) -> bool:
        """Whether none of the batch can run until somebody gives memory back."""
        return self._stuck and bool(self.running)

    # ------------------------------------------------------------ steps

    def most(self, seconds: float) -> int:
        """How many steps the batch may take in one go: until tokens are to be sent, a range is moved up or, as far
        as the cost table knows, `seconds` have passed."""
        most = self.own.stream_interval
        if most == 1:
            return 1
        if self._until <= 0:
            self._until = min(map(self.forecast.until_moved, self.running.values()), default=NEVER)
        a_step_s = self.own.cost.decode_s(len(self.running), self.forecast.context)
        if a_step_s:
            most = min(most, int(seconds / a_step_s) + 1)
        return max(min(most, self._until), 1)

    def step_done(
        self, spans: Sequence[Span], tokens: Sequence[Sampled], preempted: Sequence[str], steps: int
    ) -> tuple[list[TokenItem], Ended]:
        """What is to be told, and who has ended and how. Those still count as running."""
        self._until, self._kept = self._until - steps, None
        self._stuck = not spans and bool(self.running)
        items: list[TokenItem] = []
        for key in preempted:  # it may wait for long: what it has is told
            request = self.running[key]
            request.preempted += 1
            self.preempted[key] = request
            self._ask = True
            if len(request.tokens) > request.sent:
                items.append(self.token_item(request))
                self._mark(request)
        if self.preempted:
            for span in spans:
                resumed = self.preempted.get(span.key)
                if resumed is not None:
                    resumed.recomputed += max(min(span.stop, len(resumed.offer.prompt)) - span.start, 0)
        return items, self._collect(tokens, items)

    def _collect(self, tokens: Sequence[Sampled], items: list[TokenItem]) -> Ended:
        running, interval, ended, count = self.running, self.own.stream_interval, Ended(), 0
        for sampled in tokens:
            request = running.get(sampled.key)
            if request is None:
                raise Broken(f"a token for {sampled.key}, which was not admitted")
            mine, ids = request.tokens, sampled.ids
            mine += ids
            count += len(ids)
            if sampled.reason is not None:
                end = End(reason=sampled.reason, receipt=request.receipt(self.own.iid))
                items.append(self.token_item(request, end))
                ended.append((request, end))
            elif len(mine) >= request.mark:
                if len(mine) >= request.due:
                    self._look(request)
                if len(mine) - request.sent >= interval:
                    items.append(self.token_item(request))
                request.mark = min(request.due, request.sent + interval)
        self.forecast.wrote(count)
        if self.preempted:
            for sampled in tokens:
                self.preempted.pop(sampled.key, None)
        return ended

    def token_item(self, request: DecodeRequest, end: End | None = None) -> TokenItem:
        """Its tokens that were not told yet."""
        offer, sent = request.offer, request.sent
        request.sent = len(request.tokens)
        return TokenItem(offer.rid, offer.attempt, len(offer.output) + sent, request.tokens[sent:], end)

    def mark_sent(self, request: DecodeRequest) -> None:
        """All its tokens were sent."""
        request.sent = len(request.tokens)
        self._mark(request)

    def _look(self, request: DecodeRequest) -> None:
        """It has outgrown its account or outlived its prediction."""
        self._grow(request)
        if self.forecast.look(request):
            self._ask, self._until = True, 0

    def update_length(self, request: DecodeRequest, length: LengthRange) -> None:
        """Its range is another from now on, whether it waits or runs."""
        self.forecast.update_length(request, length)
        self._ask = True
        if request.running:
            self._until, self._kept = 0, None
            self._mark(request)

    def _grow(self, request: DecodeRequest) -> None:
        blocks = blocks_for(request.size, self.own.capacity.block_tokens)
        if blocks > request.blocks:
            self.ledger.grow(request.key, blocks)
            self.forecast.grown(request, blocks)

    def _mark(self, request: DecodeRequest) -> None:
        request.mark = min(request.due, request.sent + self.own.stream_interval)

    def check(self) -> None:
        for key, request in self.running.items():
            if not (request.running and request.landed_as and request.allocated):
                raise Broken(f"{key} runs without its KV")
            if request.written >= request.offer.sampling.max_tokens:
                raise Broken(f"{key} runs past max_tokens")
            if (
                request.mark != min(request.due, request.sent + self.own.stream_interval)
                or len(request.tokens) >= request.mark
            ):
                raise Broken(
                    f"{key} has {len(request.tokens)} tokens and is to be looked at when it has {request.mark}"
                )
        if any(request.running or not request.landed_as or request.end for request in self.landed.values()):
            raise Broken(f"not all of {list(self.landed)} wait for admission")
        if any(self.running.get(key) is not request for key, request in self.preempted.items()):
            raise Broken(f"not all of {list(self.preempted)} are in the batch")


def _member(request: DecodeRequest) -> BatchMember:
    return BatchMember(request.size, _end(request))


def _end(request: DecodeRequest) -> int:
    return len(request.offer.prompt) + max(request.admit_end, request.written + 1)
