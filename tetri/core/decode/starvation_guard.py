"""Offers that found no room at a decode instance. Small ones of several prefill instances could take what comes free
again and again, and keep a large one out for ever, with all that wait behind it where it comes from. So whoever has
been turned away for long is next: nobody is let in beside whom it would not fit."""

from __future__ import annotations

from dataclasses import dataclass

from tetri.core.instance.ledger import Ledger

LONG_S = 5.0  # a shorter one would reorder what merely waits its turn under load


@dataclass(slots=True)
class WaitingOffer:
    rid: str
    blocks: int
    since: float
    asked: float  # the last time


class StarvationGuard:
    """By request. Who does not ask again for `gone_s` has gone elsewhere, or is over."""

    def __init__(self, gone_s: float) -> None:
        self.gone_s = gone_s
        self.waiting: dict[str, WaitingOffer] = {}

    def enter(self, rid: str, blocks: int, now: float) -> None:
        """It was turned away (again)."""
        known = self.waiting.get(rid)
        if known is None or now - known.asked > self.gone_s:
            known = self.waiting[rid] = WaitingOffer(rid, blocks, now, now)
        known.blocks, known.asked = blocks, now
        for gone in [each.rid for each in self.waiting.values() if now - each.asked > self.gone_s]:
            del self.waiting[gone]

    def leave(self, rid: str) -> None:
        """It is in, or over."""
        self.waiting.pop(rid, None)

    def before(self, rid: str, blocks: int, ledger: Ledger, kept: int, now: float) -> str | None:
        """Why a request must wait for another one, which would find no room beside it; None when it need not."""
        first: WaitingOffer | None = None
        for each in self.waiting.values():
            late = now - each.since >= LONG_S and now - each.asked <= self.gone_s
            if late and (first is None or each.since < first.since):
                first = each
        if first is None or first.rid == rid:
            return None
        both = blocks + first.blocks
        if ledger.reserved + both <= ledger.reserve_limit and both + kept <= ledger.free:
            return None
        return f"a request of {first.blocks} blocks, turned away for {now - first.since:.1f} s, is next"
