"""The starvation guard of a decode instance: gives priority to an offer that was refused for a long time.

Small offers of several prefill instances could use all memory that becomes free, and so starve a large offer and all
requests that wait behind it. After `LONG_S` of refusals the large offer is next: others are granted only if it fits
beside them."""

from __future__ import annotations

from dataclasses import dataclass

from tetri.core.instance.ledger import Ledger

LONG_S = 5.0  # shorter waits are normal under load, and must not change the order


@dataclass(slots=True)
class WaitingOffer:
    """A refused request. `since`: time of its first refusal; `asked`: time of its last offer."""

    rid: str
    blocks: int
    since: float
    asked: float


class StarvationGuard:
    """The refused requests by id. One that makes no new offer for `gone_s` is forgotten: it has ended, or another
    instance serves it."""

    def __init__(self, gone_s: float) -> None:
        self.gone_s = gone_s
        self.waiting: dict[str, WaitingOffer] = {}

    def enter(self, rid: str, blocks: int, now: float) -> None:
        """Record that an offer was refused for lack of memory."""
        known = self.waiting.get(rid)
        if known is None or now - known.asked > self.gone_s:
            known = self.waiting[rid] = WaitingOffer(rid, blocks, now, now)
        known.blocks, known.asked = blocks, now
        for gone in [each.rid for each in self.waiting.values() if now - each.asked > self.gone_s]:
            del self.waiting[gone]

    def leave(self, rid: str) -> None:
        """Forget a request that was granted or has ended."""
        self.waiting.pop(rid, None)

    def before(self, rid: str, blocks: int, ledger: Ledger, kept: int, now: float) -> str | None:
        """Return why a request must wait for a starving one that would not fit beside it, or None.

        `kept`: blocks that must stay free for the running batch."""
        first: WaitingOffer | None = None
        for each in self.waiting.values():
            starving = now - each.since >= LONG_S and now - each.asked <= self.gone_s
            if starving and (first is None or each.since < first.since):
                first = each
        if first is None or first.rid == rid:
            return None
        together = blocks + first.blocks
        if ledger.reserved + together <= ledger.reserve_limit and together + kept <= ledger.free:
            return None
        return f"a request of {first.blocks} blocks, turned away for {now - first.since:.1f} s, is next"
