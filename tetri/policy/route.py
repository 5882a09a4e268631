"""Where a request goes: which prefill instance (the broker asks), which decode instance (a dispatcher asks)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tetri.policy.views import DecodeView, PrefillView


def least_loaded(views: Sequence[PrefillView]) -> str | None:
    """The prefill instance with the fewest queued prompt tokens (paper, section 3.2); the first of equals."""
    return min(views, key=lambda view: view.queued_tokens).iid if views else None


def first_fit(blocks: int, views: Sequence[DecodeView], rng: Random) -> str | None:
    """The first decode instance, in the order given, that has room for the request's KV blocks."""
    return next((view.iid for view in views if view.free_blocks >= blocks), None)
