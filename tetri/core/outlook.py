"""What the requests at a decode instance are predicted to take until they have ended."""

from __future__ import annotations

from collections.abc import Iterable

from tetri.core.actions import Broken
from tetri.core.foresight import Foresight
from tetri.core.peers import Identity
from tetri.core.seat import NEVER, Seat
from tetri.policy.length import end_of, heavy, moved_up
from tetri.request import LengthRange, blocks_for


class Outlook:
    """Sums over the seats that wait or run, kept as these come, grow and go, so that a load report costs nothing.

    heavy     those predicted to be heavy decodes
    growth    blocks that all are predicted to take in addition
    left      output tokens that all are predicted to write yet
    context   tokens, prompts and outputs

    Who outlives its range gets another: with a `foresight` that of those who went on as far, else the next one of the
    same width.
    """

    def __init__(self, own: Identity, foresight: Foresight | None = None) -> None:
        self.own, self.foresight = own, foresight
        self.seats = self.heavy = self.growth = self.left = self.context = 0

    def enter(self, seat: Seat) -> None:
        self.seats += 1
        self.context += seat.size
        self._predict(seat)
        self._count(seat, 1)

    def leave(self, seat: Seat) -> None:
        self._count(seat, -1)
        self.context -= seat.size
        self.seats -= 1

    def wrote(self, tokens: int) -> None:
        """So many more tokens, of any of them."""
        self.context += tokens
        self.left -= tokens

    def grown(self, seat: Seat, blocks: int) -> None:
        """Its account has so many blocks now."""
        seat.blocks = blocks
        self.growth -= seat.growth
        self._grow(seat)
        self.growth += seat.growth

    def foreseen(self, seat: Seat, length: LengthRange) -> None:
        """This is predicted of it from now on."""
        self._count(seat, -1)
        seat.length = length
        self._predict(seat)
        self._count(seat, 1)

    def look(self, seat: Seat) -> bool:
        """Predict again if it has outlived what was predicted. Whether its range was moved up."""
        if seat.written < seat.dispatch_end and (seat.length is None or seat.written < seat.length.high):
            return False
        before = seat.length
        self._count(seat, -1)
        self._predict(seat)
        self._count(seat, 1)
        return seat.length is not before

    def until_moved(self, seat: Seat) -> int:
        """Tokens that it writes until its range is moved up."""
        return NEVER if seat.length is None else seat.length.high - seat.written

    def decode_s(self) -> float:
        """Predicted seconds until all have ended, as if they ended together: the tokens that are left, shared by the
        batch that they make now. Not the longest one's, for the question is when there is room for more."""
        batch = min(self.seats, self.own.capacity.max_batch)
        if not batch:
            return 0.0
        return self.own.cost.decode_run_s(batch, self.context * batch // self.seats, -(-self.left // batch))

    def _predict(self, seat: Seat) -> None:
        """A request that goes on writes one more token at least. One that outlives the end of its range that the
        dispatcher reckons with is predicted by the high end from then on."""
        rules, most = self.own.rules, seat.offer.sampling.max_tokens
        least = max(seat.written, len(seat.offer.output) + 1) + 1
        if seat.length is not None:
            if self.foresight is None:
                seat.length = moved_up(seat.length, least - 1)
            elif seat.length.high < least:
                seat.length = self.foresight.unknown(seat.offer.sampling, least - 1)
        end = end_of(seat.length, rules.dispatch_end, most)
        seat.dispatch_end = end if end >= least else max(end_of(seat.length, "high", most), least)
        seat.admit_end = end_of(seat.length, rules.admit_end, most)
        seat.heavy = heavy(seat.length, rules.heavy_tokens, most)
        self._grow(seat)

    def _grow(self, seat: Seat) -> None:
        blocks = blocks_for(len(seat.offer.prompt) + seat.dispatch_end, self.own.capacity.block_tokens)
        seat.growth = max(blocks - seat.blocks, 0)
        high = NEVER if seat.length is None else seat.length.high
        room = seat.blocks * self.own.capacity.block_tokens - len(seat.offer.prompt) + 1
        seat.due = min(high, seat.dispatch_end, room) - len(seat.offer.output)

    def _count(self, seat: Seat, sign: int) -> None:
        self.heavy += sign * seat.heavy
        self.growth += sign * seat.growth
        self.left += sign * (seat.dispatch_end - seat.written)

    def check(self, seats: Iterable[Seat]) -> None:
        """Count everything again."""
        now = (self.seats, self.heavy, self.growth, self.left, self.context)
        again = Outlook(self.own)
        for seat in seats:
            again.seats += 1
            again.context += seat.size
            again._count(seat, 1)
            if seat.tokens and not seat.written < seat.dispatch_end:
                raise Broken(f"{seat.key} has outlived its prediction of {seat.dispatch_end} tokens")
            if seat.tokens and seat.length is not None and not seat.written < seat.length.high:
                raise Broken(f"{seat.key} has {seat.written} tokens and its range is {seat.length}")
        counted = (again.seats, again.heavy, again.growth, again.left, again.context)
        if now != counted:
            raise Broken(f"seats, heavy, growth, left, context are {now}, counted {counted}")
