"""The decode phase of the same worker, as its prefill phase sees it."""

from __future__ import annotations

from typing import Protocol

from tetri.core.actions import Action
from tetri.request import Token
from tetri.wire.handover import Offer
from tetri.wire.load import Load


class Home(Protocol):
    """Where a request goes that decodes on the instance that prefills it."""

    def load(self) -> Load | None:
        """Return what a decode route reads of the load of this instance; None if its role takes no decodes."""

    def decodes(self) -> bool:
        """Return whether the role of this instance takes decodes."""

    def adapts(self) -> bool:
        """Return whether the role of this instance is auto."""

    def stay(self, offer: Offer) -> tuple[str, list[Action]] | None:
        """Expect a request here, whose KV is computed in its place. Return the key of its decode request; None if it
        cannot stay."""

    def land(self, decode_key: str, token: Token) -> list[Action]:
        """The prefill of a request that stays has ended with this token."""
