"""The running batch of a decode instance: admits requests, sizes a step and collects its tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice, takewhile
from typing import Any

from tetri.core.actions import Broken, HoldRequest
from tetri.core.decode.load_forecast import LoadForecast
from tetri.core.decode.request import NEVER, DecodeRequest
from tetri.core.instance.activity import ActivityLog
from tetri.core.instance.identity import Identity
from tetri.core.instance.ledger import Ledger
from tetri.engine_request import Sampled, StepDone
from tetri.policy.admit import next_growth
from tetri.policy.rules import ADMISSIONS, KEPT_FREE
from tetri.policy.views import BatchMember, BatchView, WaitingRequest
from tetri.request import LengthRange, Token, blocks_for
from tetri.wire.messages import End, TokenItem

Ended = list[tuple[DecodeRequest, End]]


class Batch:
    """The requests whose KV has landed, by key.

    landed      wait for admission
    running     are in the batch
    stopped     go on at another instance, and are out of the batch until that has them (migration.py)
    preempted   those of `running` whose KV the engine must still recompute after a preemption
    lone        the request that the next step must compute alone: the next to be admitted, or in the batch since such a
                step; None if there is none
    held        those of `running` that a lone step leaves out
    promised    blocks for a prompt of this instance, that no hand-over gets
    """

    def __init__(self, own: Identity, ledger: Ledger, forecast: LoadForecast, activity: ActivityLog) -> None:
        self.own, self.ledger, self.forecast, self.activity = own, ledger, forecast, activity
        self.landed: dict[str, DecodeRequest] = {}
        self.running: dict[str, DecodeRequest] = {}
        self.stopped: dict[str, DecodeRequest] = {}
        self.preempted: dict[str, DecodeRequest] = {}
        self.lone: DecodeRequest | None = None
        self.held: list[str] = []
        self.promised = 0
        self._landings = 0
        self._stuck = False  # the last step ran nothing: all are preempted and wait for memory
        self._changed = False  # whether the admission policy must be asked again
        self._asked = (0, 0)  # free blocks and batch limit when the policy was last asked
        self._steps_left = 0  # steps until the first length range ends, at most; <= 0: count again
        self._kept_free: int | None = None  # blocks to keep free; None: count again

    # ------------------------------------------------------------ membership

    def land(self, request: DecodeRequest, tokens: Sequence[Token]) -> None:
        """Add a request whose KV has all landed. The sender has already sent `tokens`, its output of this attempt, to
        the broker."""
        self._landings += 1
        request.landed_as = self._landings
        request.first_at = request.first_at or self.activity.now
        request.tokens += tokens
        request.sent = len(tokens)
        self.forecast.wrote(len(tokens))
        self.forecast.look(request)
        self.landed[request.key] = request
        self._changed, self._kept_free = True, None

    def stop(self, request: DecodeRequest) -> None:
        """Take a running request out of the batch. It keeps its memory."""
        self.stopped[request.key] = self.running.pop(request.key)
        request.running = False
        self._changed, self._steps_left, self._kept_free = True, 0, None

    def go_on(self, request: DecodeRequest) -> None:
        """Bring a stopped request back into the batch."""
        self.running[request.key] = self.stopped.pop(request.key)
        request.running = True
        self._set_mark(request)
        self._steps_left, self._kept_free = 0, None

    def leave(self, request: DecodeRequest) -> None:
        """Remove a request that has ended or was cancelled."""
        request.running = False
        for requests in (self.landed, self.running, self.stopped, self.preempted):
            requests.pop(request.key, None)
        if self.lone is request:
            self.lone = None
        self._changed, self._steps_left, self._kept_free = True, 0, None

    def admit(self, most: int) -> list[DecodeRequest]:
        """Admit landed requests to the batch, up to `most` in all, and return them.

        If nothing runs, admit the oldest whatever the policy says: the engine can preempt requests in the batch to
        free memory, but not waiting ones.

        Ask the policy only when the batch, a length range or the free memory has changed. In between every request
        grows as predicted, so the answer is the same, and the engine may run several steps in one go."""
        if self.lone is not None or not self.landed:
            return []
        alone = not self.running or self._stuck
        free, larger = self._asked
        if not (alone or self._changed or self.ledger.free > free or most > larger):
            return []
        keys = self._choose(most - len(self.running), most) if len(self.running) < most else []
        if not keys and alone:
            keys = [next(iter(self.landed))]
        shared = list(takewhile(lambda key: not self.landed[key].alone, keys))
        if keys and not shared and (alone or self.ledger.free > 0):  # without a free block it might be preempted
            self.lone = self.landed[keys[0]]
        for key in shared:
            self._admit(self.landed[key])
        self._changed, self._steps_left, self._asked = len(shared) < len(keys), 0, (self.ledger.free, most)
        self._kept_free = None
        return [self.running[key] for key in shared]

    def _choose(self, count: int, most: int) -> list[str]:
        """Return up to `count` landed requests to admit: first those that ran elsewhere until now."""
        ran = [key for key, request in self.landed.items() if request.offer.receipt is not None]
        return [*dict.fromkeys([*ran, *self._ask_policy(most)])][:count] if ran else self._ask_policy(most)

    def _admit(self, request: DecodeRequest) -> None:
        self.running[request.key] = self.landed.pop(request.key)
        request.running = True
        self.ledger.run(request.key)
        self._grow(request)
        self._set_mark(request)
        self._steps_left, self._kept_free = 0, None

    # ------------------------------------------------------------ lone steps

    def admit_lone(self) -> list[DecodeRequest]:
        """Admit the lone request, unless it is in the batch already. Return what this admits."""
        if self.lone is None or self.lone.running:
            return []
        self._admit(self.lone)
        return [self.lone]

    def hold_all_but(self, key: str) -> list[HoldRequest]:
        """Hold the whole batch, except one request, for a lone step."""
        self.held = [other for other in self.running if other != key]
        return [HoldRequest(other, True) for other in self.held]

    def release_all(self) -> list[HoldRequest]:
        """Let the batch go on after a lone step."""
        held, self.held = [key for key in self.held if key in self.running], []
        return [HoldRequest(key, False) for key in held]

    def _share_steps_again(self, request: DecodeRequest) -> None:
        """Let the lone request share steps with others once it is past the token at which it may have killed, or if it
        was preempted. The broker lacks the tokens that were not sent when its worker died, and perhaps a last message:
        less than two messages, of which the prefill has computed one token."""
        if len(request.tokens) >= 2 * self.own.stream_interval or request.preempted:
            request.alone, self.lone, self._changed = False, None, True

    def kept_free(self) -> int:
        """Return the blocks that no hand-over gets: the batch or a prompt does."""
        return self.growth() + self.promised

    def growth(self) -> int:
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
        return BatchView(_Members(running.values()), most, self.ledger.free, self.own.capacity.block_tokens)

    def _ask_policy(self, most: int) -> list[str]:
        waiting = [
            WaitingRequest(
                key, request.landed_as, request.flow.blocks, request.size, _predicted_end(request), _due(request)
            )
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
        step_s = self.forecast.cost.decode_s(len(self.running), self.forecast.context)
        if step_s:
            most = min(most, int(seconds / step_s) + 1)
        return max(min(most, self._steps_left), 1)

    def step_done(self, done: StepDone) -> tuple[list[TokenItem], Ended]:
        """Return the tokens to send, and the requests that have ended, each with its End. The caller removes those."""
        self._steps_left, self._kept_free = self._steps_left - done.steps, None
        self._stuck = not (done.spans or done.tokens) and len(self.running) > len(self.held)
        items: list[TokenItem] = []
        for key in done.preempted:  # it may wait for long, so send the tokens that it has
            request = self.running[key]
            request.preempted += 1
            self.activity.preempted += 1
            self.activity.happened("preempted", request.offer)
            self.preempted[key] = request
            self._changed = True
            if len(request.tokens) > request.sent:
                items.append(self.token_item(request))
                self._set_mark(request)
        if self.preempted:
            for span in done.spans:
                recomputing = self.preempted.get(span.key)
                if recomputing is not None:
                    self.activity.computed("recompute", recomputing.offer, span.start, span.stop)
                    recomputing.recomputed += max(min(span.stop, len(recomputing.offer.prompt)) - span.start, 0)
        ended = self._collect(done.tokens, done.steps, items)
        if self.lone is not None:
            self._share_steps_again(self.lone)
        return items, ended

    def _collect(self, tokens: Sequence[Sampled], steps: int, items: list[TokenItem]) -> Ended:
        find, interval, count = self.running.get, self.own.stream_interval, steps * len(tokens)
        ended: Ended = []
        for sampled in tokens:
            request = find(sampled.key)
            if request is None:
                raise Broken(f"a token for {sampled.key}, which was not admitted")
            output, ids, reason = request.tokens, sampled.ids, sampled.reason
            output += ids
            if reason is not None:
                count += len(ids) - steps  # an invalid one is no token
                end = End(reason=reason, receipt=request.receipt(self.own.iid), error=sampled.error)
                items.append(self.token_item(request, end))
                ended.append((request, end))
            elif len(output) >= request.mark:
                if len(output) >= request.due:
                    self._repredict(request)
                if len(output) - request.sent >= interval:
                    items.append(self.token_item(request))
                request.mark = min(request.due, request.sent + interval)
        self.forecast.wrote(count)
        self.activity.decode_tokens += count
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
        if self.lone is not None and self.lone not in (*self.landed.values(), *self.running.values()):
            raise Broken(f"{self.lone.key} has its turn and is not there")
        for request in (*self.landed.values(), *self.stopped.values()):
            if request.running or not request.landed_as or request.end:
                raise Broken(f"{request.key} neither waits for admission nor has it stopped")
        if any(self.running.get(key) is not request for key, request in self.preempted.items()):
            raise Broken(f"not all of {list(self.preempted)} are in the batch")


class _Members(Sequence[BatchMember]):
    """The batch as policies see it. Each request is looked at when a policy does so: some only count them."""

    def __init__(self, requests: Collection[DecodeRequest]) -> None:
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[BatchMember]:
        return iter(self._listed)

    def __getitem__(self, place: Any) -> Any:
        return self._listed[place]

    @cached_property
    def _listed(self) -> list[BatchMember]:
        return [BatchMember(request.size, _predicted_end(request)) for request in self._requests]


def _due(request: DecodeRequest) -> float:
    """When its next token is late."""
    return request.first_at + len(request.tokens) * (request.offer.tpot_s or 0.0)


def _predicted_end(request: DecodeRequest) -> int:
    return len(request.offer.prompt) + max(request.admit_end, request.written + 1)
