"""The running batch of a decode instance: admits requests, sizes a step and collects its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from tetri.core.actions import Broken
from tetri.core.decode.load_forecast import LoadForecast
from tetri.core.decode.request import NEVER, DecodeRequest
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.engine_request import Sampled, StepDone
from tetri.policy.admit import next_growth
from tetri.policy.rules import ADMISSIONS, KEPT_FREE
from tetri.policy.views import BatchMember, BatchView, WaitingRequest
from tetri.request import LengthRange, blocks_for
from tetri.wire.messages import End, TokenItem

Ended = list[tuple[DecodeRequest, End]]


class Batch:
    """The requests whose KV has landed, by key.

    landed      wait for admission
    running     are in the batch
    preempted   those of `running` whose KV the engine must still recompute after a preemption
    """

    def __init__(self, own: Identity, ledger: Ledger, forecast: LoadForecast) -> None:
        self.own, self.ledger, self.forecast = own, ledger, forecast
        self.landed: dict[str, DecodeRequest] = {}
        self.running: dict[str, DecodeRequest] = {}
        self.preempted: dict[str, DecodeRequest] = {}
        self._landings = 0
        self._stuck = False  # the last step ran nothing: all are preempted and wait for memory
        self._changed = False  # whether the admission policy must be asked again
        self._asked = (0, 0)  # free blocks and batch limit when the policy was last asked
        self._steps_left = 0  # steps until the first length range ends, at most; <= 0: count again
        self._kept_free: int | None = None  # blocks to keep free; None: count again

    # ------------------------------------------------------------ membership

    def land(self, request: DecodeRequest, token: int) -> None:
        """Add a request whose KV has all landed. The prefill instance has already sent `token`, its first output token,
        to the broker."""
        self._landings += 1
        request.landed_as = self._landings
        request.tokens.append(token)
        request.sent = 1
        self.forecast.wrote(1)
        self.landed[request.key] = request
        self._changed, self._kept_free = True, None

    def leave(self, request: DecodeRequest) -> None:
        """Remove a request that has ended or was cancelled."""
        request.running = False
        for requests in (self.landed, self.running, self.preempted):
            requests.pop(request.key, None)
        self._changed, self._steps_left, self._kept_free = True, 0, None

    def admit(self, most: int) -> list[DecodeRequest]:
        """Admit landed requests to the batch, up to `most` in all, and return them.

        If nothing runs, admit the oldest whatever the policy says: the engine can preempt requests in the batch to
        free memory, but not waiting ones.

        Ask the policy only when the batch, a length range or the free memory has changed. In between every request
        grows as predicted, so the answer is the same, and the engine may run several steps in one go."""
        alone = not self.running or self._stuck
        free, larger = self._asked
        if not self.landed or not (alone or self._changed or self.ledger.free > free or most > larger):
            return []
        keys = self._ask_policy(most) if len(self.running) < most else []
        if not keys and alone:
            keys = [next(iter(self.landed))]
        for key in keys:
            request = self.running[key] = self.landed.pop(key)
            request.running = True
            self.ledger.run(key)
            self._grow(request)
            self._set_mark(request)
        self._changed, self._steps_left, self._asked, self._kept_free = False, 0, (self.ledger.free, most), None
        return [self.running[key] for key in keys]

    def kept_free(self) -> int:
        """Return the blocks that must stay free for the growth of the batch, as the admission policy assumed.

        Counted once between two steps: many offers may arrive in that time, and a grant does not change the result."""
        if self._kept_free is None:
            running = self.running or dict(islice(self.landed.items(), 1))  # the next to run, if none does
            kept = KEPT_FREE.get(self.own.rules.admit)
            if kept is None:
                self._kept_free = next_growth(len(running))
            else:
                self._kept_free = kept(self._view(running, self.own.capacity.max_batch))
        return self._kept_free

    def _view(self, running: Mapping[str, DecodeRequest], most: int) -> BatchView:
        members = [BatchMember(request.size, _predicted_end(request)) for request in running.values()]
        return BatchView(members, most, self.ledger.free, self.own.capacity.block_tokens)

    def _ask_policy(self, most: int) -> list[str]:
        waiting = [
            WaitingRequest(key, request.landed_as, request.flow.blocks, request.size, _predicted_end(request))
            for key, request in self.landed.items()
        ]
        return ADMISSIONS[self.own.rules.admit](waiting, self._view(self.running, most))

    def stuck(self) -> bool:
        """Return whether no request of the batch can run until memory is freed."""
        return self._stuck and bool(self.running)

    # ------------------------------------------------------------ steps

    def most(self, seconds: float) -> int:
        """Return how many steps the batch may run in one go: until tokens must be sent, a length range ends or
        `seconds` have passed, by the cost table."""
        most = self.own.stream_interval
        if most == 1:
            return 1
        if self._steps_left <= 0:
            self._steps_left = min(map(self.forecast.until_moved, self.running.values()), default=NEVER)
        step_s = self.own.cost.decode_s(len(self.running), self.forecast.context)
        if step_s:
            most = min(most, int(seconds / step_s) + 1)
        return max(min(most, self._steps_left), 1)

    def step_done(self, done: StepDone) -> tuple[list[TokenItem], Ended]:
        """Return the tokens to send, and the requests that have ended, each with its End. The caller removes those."""
        self._steps_left, self._kept_free = self._steps_left - done.steps, None
        self._stuck = not done.spans and bool(self.running)
        items: list[TokenItem] = []
        for key in done.preempted:  # it may wait for long, so send the tokens that it has
            request = self.running[key]
            request.preempted += 1
            self.preempted[key] = request
            self._changed = True
            if len(request.tokens) > request.sent:
                items.append(self.token_item(request))
                self._set_mark(request)
        if self.preempted:
            for span in done.spans:
                recomputing = self.preempted.get(span.key)
                if recomputing is not None:
                    recomputing.recomputed += max(min(span.stop, len(recomputing.offer.prompt)) - span.start, 0)
        return items, self._collect(done.tokens, items)

    def _collect(self, tokens: Sequence[Sampled], items: list[TokenItem]) -> Ended:
        running, interval, ended, count = self.running, self.own.stream_interval, Ended(), 0
        for sampled in tokens:
            request = running.get(sampled.key)
            if request is None:
                raise Broken(f"a token for {sampled.key}, which was not admitted")
            output, ids = request.tokens, sampled.ids
            output += ids
            count += len(ids)
            if sampled.reason is not None:
                end = End(reason=sampled.reason, receipt=request.receipt(self.own.iid), error=sampled.error)
                items.append(self.token_item(request, end))
                ended.append((request, end))
            elif len(output) >= request.mark:
                if len(output) >= request.due:
                    self._repredict(request)
                if len(output) - request.sent >= interval:
                    items.append(self.token_item(request))
                request.mark = min(request.due, request.sent + interval)
        self.forecast.wrote(count)
        if self.preempted:
            for sampled in tokens:
                self.preempted.pop(sampled.key, None)
        return ended

    def token_item(self, request: DecodeRequest, end: End | None = None) -> TokenItem:
        """Return the tokens of a request that were not sent yet, and count them as sent."""
        offer, sent = request.offer, request.sent
        request.sent = len(request.tokens)
        return TokenItem(offer.rid, offer.attempt, len(offer.output) + sent, request.tokens[sent:], end)

    def mark_sent(self, request: DecodeRequest) -> None:
        """Record that all tokens of a running request were sent."""
        request.sent = len(request.tokens)
        self._set_mark(request)

    def _repredict(self, request: DecodeRequest) -> None:
        """Update the account and the prediction of a request that has outgrown either."""
        self._grow(request)
        if self.forecast.look(request):
            self._changed, self._steps_left = True, 0

    def update_length(self, request: DecodeRequest, length: LengthRange) -> None:
        """Set a new length range of a request, landed or not."""
        self.forecast.update_length(request, length)
        self._changed = True
        if request.running:
            self._steps_left, self._kept_free = 0, None
            self._set_mark(request)

    def _grow(self, request: DecodeRequest) -> None:
        blocks = blocks_for(request.size, self.own.capacity.block_tokens)
        if blocks > request.blocks:
            self.ledger.grow(request.key, blocks)
            self.forecast.grown(request, blocks)

    def _set_mark(self, request: DecodeRequest) -> None:
        request.mark = min(request.due, request.sent + self.own.stream_interval)

    def check(self) -> None:
        """Raise Broken when a request is in the wrong place or its marks are wrong."""
        for key, request in self.running.items():
            if not (request.running and request.landed_as and request.allocated):
                raise Broken(f"{key} runs without its KV")
            if request.written >= request.offer.sampling.max_tokens:
                raise Broken(f"{key} runs past max_tokens")
            tokens, mark = len(request.tokens), min(request.due, request.sent + self.own.stream_interval)
            if request.mark != mark or tokens >= mark:
                raise Broken(f"{key} has {tokens} tokens and is to be looked at when it has {request.mark}")
        if any(request.running or not request.landed_as or request.end for request in self.landed.values()):
            raise Broken(f"not all of {list(self.landed)} wait for admission")
        if any(self.running.get(key) is not request for key, request in self.preempted.items()):
            raise Broken(f"not all of {list(self.preempted)} are in the batch")


def _predicted_end(request: DecodeRequest) -> int:
    return len(request.offer.prompt) + max(request.admit_end, request.written + 1)
