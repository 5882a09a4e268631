"""Which landed requests enter the running batch of a decode instance (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.policy.views import BatchView, WaitingSeat


def greedy(waiting: Sequence[WaitingSeat], batch: BatchView) -> list[str]:
    """Admit in the order of landing while the batch has a slot and memory is not yet overdrawn. Nothing is
    set aside for the output to come, so the engine may have to preempt."""
    if batch.free_blocks < 0:
        return []
    slots = max(batch.max_batch - len(batch.running), 0)
    return [seat.key for seat in sorted(waiting, key=lambda seat: seat.landed)[:slots]]
