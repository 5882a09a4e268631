"""The decode phase of a worker, as its own prefill phase sees it (core/prefill/home.py)."""

from __future__ import annotations

from tetri.core.actions import Action
from tetri.core.decode.hand_overs import HandOvers
from tetri.core.worker.load_report import LoadReporter
from tetri.request import DECODE_ROLES, Token
from tetri.wire.handover import Offer
from tetri.wire.load import Load


class WorkerHome:
    """Implements Home."""

    def __init__(self, reporter: LoadReporter, hand_overs: HandOvers) -> None:
        self.reporter, self.hand_overs = reporter, hand_overs

    def load(self) -> Load | None:
        """As in Home."""
        return self.reporter.decode_load() if self.decodes() else None

    def decodes(self) -> bool:
        """As in Home."""
        return self.reporter.role in DECODE_ROLES

    def adapts(self) -> bool:
        """As in Home."""
        return self.reporter.role == "auto"

    def stay(self, offer: Offer) -> tuple[str, list[Action]] | None:
        """As in Home."""
        return self.hand_overs.stay(offer)

    def land(self, decode_key: str, token: Token) -> list[Action]:
        """As in Home."""
        return self.hand_overs.land(decode_key, token)
