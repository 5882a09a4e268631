"""The running batch of a decode instance: who is admitted, how far a step goes, and the tokens that come out."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.core.actions import Broken
from tetri.core.ledger import Ledger
from tetri.core.outlook import Outlook
from tetri.core.peers import Identity
from tetri.core.seat import NEVER, Seat
from tetri.leg import Sampled, Span
from tetri.policy.rules import ADMISSIONS, KEPT_FREE
from tetri.policy.views import BatchView, Member, WaitingSeat
from tetri.request import LengthRange, blocks_for
from tetri.wire.messages import End, TokenItem

Ended = list[tuple[Seat, End]]


class Batch:
    """`landed` wait for admission, `running` are in the batch, both by key. `lapsed` were preempted, and their KV is
    not all computed again."""

    def __init__(self, own: Identity, ledger: Ledger, outlook: Outlook) -> None:
        self.own, self.ledger, self.outlook = own, ledger, outlook
        self.landed: dict[str, Seat] = {}
        self.running: dict[str, Seat] = {}
        self.lapsed: dict[str, Seat] = {}
        self._landings = 0
        self._stuck = False  # the last step ran none of the batch: all are preempted, and wait for memory
        self._ask = False  # something has changed since the admission policy was last asked
        self._asked = (0, 0)  # free blocks then, and how large the batch might be
        self._until = 0  # steps until the first range is moved up, at most; 0: count again
        self._kept: int | None = None  # blocks to be kept free; None: the batch has changed since they were counted

    # ------------------------------------------------------------ who is in it

    def land(self, seat: Seat, token: int) -> None:
        """All its KV is here, and the first token, which the prefill side has told of."""
        self._landings += 1
        seat.landed_as = self._landings
        seat.tokens.append(token)
        seat.sent = 1
        self.outlook.wrote(1)
        self.landed[seat.key] = seat
        self._ask = True

    def leave(self, seat: Seat) -> None:
        """It has ended, or nobody wants it any more."""
        seat.running = False
        for place in (self.landed, self.running, self.lapsed):
            place.pop(seat.key, None)
        self._ask, self._until, self._kept = True, 0, None

    def admit(self, most: int) -> list[Seat]:
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
            seat = self.running[key] = self.landed.pop(key)
            seat.running = True
            self.ledger.run(key)
            self._grow(seat)
            self._mark(seat)
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
        members = [_member(seat) for seat in self.running.values()]
        return BatchView(members, most, self.ledger.free, self.own.capacity.block_tokens)

    def _policy(self, most: int) -> list[str]:
        waiting = [
            WaitingSeat(key, seat.landed_as, seat.flow.blocks, seat.size, _end(seat))
            for key, seat in self.landed.items()
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
            self._until = min(map(self.outlook.until_moved, self.running.values()), default=NEVER)
        a_step_s = self.own.cost.decode_s(len(self.running), self.outlook.context)
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
            seat = self.running[key]
            seat.preempted += 1
            self.lapsed[key] = seat
            self._ask = True
            if len(seat.tokens) > seat.sent:
                items.append(self.news(seat))
                self._mark(seat)
        if self.lapsed:
            for span in spans:
                lapsed = self.lapsed.get(span.key)
                if lapsed is not None:
                    lapsed.recomputed += max(min(span.stop, len(lapsed.offer.prompt)) - span.start, 0)
        return items, self._take(tokens, items)

    def _take(self, tokens: Sequence[Sampled], items: list[TokenItem]) -> Ended:
        running, interval, ended, count = self.running, self.own.stream_interval, Ended(), 0
        for sampled in tokens:
            seat = running.get(sampled.key)
            if seat is None:
                raise Broken(f"a token for {sampled.key}, which was not admitted")
            mine, ids = seat.tokens, sampled.ids
            mine += ids
            count += len(ids)
            if sampled.reason is not None:
                end = End(reason=sampled.reason, receipt=seat.receipt(self.own.iid))
                items.append(self.news(seat, end))
                ended.append((seat, end))
            elif len(mine) >= seat.mark:
                if len(mine) >= seat.due:
                    self._look(seat)
                if len(mine) - seat.sent >= interval:
                    items.append(self.news(seat))
                seat.mark = min(seat.due, seat.sent + interval)
        self.outlook.wrote(count)
        if self.lapsed:
            for sampled in tokens:
                self.lapsed.pop(sampled.key, None)
        return ended

    def news(self, seat: Seat, end: End | None = None) -> TokenItem:
        """Its tokens that were not told yet."""
        offer, sent = seat.offer, seat.sent
        seat.sent = len(seat.tokens)
        return TokenItem(offer.rid, offer.attempt, len(offer.output) + sent, seat.tokens[sent:], end)

    def told(self, seat: Seat) -> None:
        """All its tokens were sent."""
        seat.sent = len(seat.tokens)
        self._mark(seat)

    def _look(self, seat: Seat) -> None:
        """It has outgrown its account or outlived its prediction."""
        self._grow(seat)
        if self.outlook.look(seat):
            self._ask, self._until = True, 0

    def foreseen(self, seat: Seat, length: LengthRange) -> None:
        """Its range is another from now on, whether it waits or runs."""
        self.outlook.foreseen(seat, length)
        self._ask = True
        if seat.running:
            self._until, self._kept = 0, None
            self._mark(seat)

    def _grow(self, seat: Seat) -> None:
        blocks = blocks_for(seat.size, self.own.capacity.block_tokens)
        if blocks > seat.blocks:
            self.ledger.grow(seat.key, blocks)
            self.outlook.grown(seat, blocks)

    def _mark(self, seat: Seat) -> None:
        seat.mark = min(seat.due, seat.sent + self.own.stream_interval)

    def check(self) -> None:
        for key, seat in self.running.items():
            if not (seat.running and seat.landed_as and seat.allocated):
                raise Broken(f"{key} runs without its KV")
            if seat.written >= seat.offer.sampling.max_tokens:
                raise Broken(f"{key} runs past max_tokens")
            if seat.mark != min(seat.due, seat.sent + self.own.stream_interval) or len(seat.tokens) >= seat.mark:
                raise Broken(f"{key} has {len(seat.tokens)} tokens and is to be looked at when it has {seat.mark}")
        if any(seat.running or not seat.landed_as or seat.end for seat in self.landed.values()):
            raise Broken(f"not all of {list(self.landed)} wait for admission")
        if any(self.running.get(key) is not seat for key, seat in self.lapsed.items()):
            raise Broken(f"not all of {list(self.lapsed)} are in the batch")


def _member(seat: Seat) -> Member:
    return Member(seat.size, _end(seat))


def _end(seat: Seat) -> int:
    return len(seat.offer.prompt) + max(seat.admit_end, seat.written + 1)
