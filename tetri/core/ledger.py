"""The one owner of an engine's KV blocks. Prefill and decode are its tenants: each leg has an account, the engine
never holds more for a leg than its account says."""

from __future__ import annotations

from collections.abc import Iterable

from tetri.core.actions import Broken


class Ledger:
    """`capacity` blocks in all. Accounts of *reserved* legs (granted, not running yet) together take at most
    `reserve_share` of them, so that waiting prompts never starve running decodes; one reservation alone may be
    larger, or a long prompt could never be served."""

    def __init__(self, capacity: int, reserve_share: float) -> None:
        self.capacity = capacity
        self.reserve_limit = int(capacity * reserve_share)
        self._blocks: dict[str, int] = {}
        self._reserved: dict[str, None] = {}

    @property
    def free(self) -> int:
        """Blocks in no account. Negative while running legs have outgrown the engine: it preempts then."""
        return self.capacity - sum(self._blocks.values())

    @property
    def reserved(self) -> int:
        return sum(self._blocks[key] for key in self._reserved)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: str) -> bool:
        return key in self._blocks

    def take(self, key: str, blocks: int) -> bool:
        """Open an account for a leg that will run; False when there is no room."""
        if key in self._blocks:
            raise Broken(f"account {key} opened twice")
        if blocks > self.free:
            return False
        self._blocks[key] = blocks
        return True

    def reserve(self, key: str, blocks: int) -> str | None:
        """Open an account for a leg that waits for its KV; None when done, else why not."""
        reserved = self.reserved
        if reserved and reserved + blocks > self.reserve_limit:
            return f"{reserved} of {self.reserve_limit} blocks for waiting requests are taken"
        if not self.take(key, blocks):
            return f"{blocks} blocks needed, {self.free} free"
        self._reserved[key] = None
        return None

    def run(self, key: str) -> None:
        """A reserved leg runs now."""
        del self._reserved[key]

    def grow(self, key: str, blocks: int) -> None:
        self._blocks[key] = max(self._blocks[key], blocks)

    def close(self, key: str) -> None:
        """Close an account; closing what is not open is no error."""
        self._blocks.pop(key, None)
        self._reserved.pop(key, None)

    def check(self, held: Iterable[tuple[str, int]]) -> None:
        """Compare with what the engine says it holds, leg by leg."""
        for key, blocks in held:
            if blocks > self._blocks.get(key, 0):
                raise Broken(f"the engine holds {blocks} blocks for {key}, the ledger {self._blocks.get(key, 0)}")
        if any(key not in self._blocks for key in self._reserved):
            raise Broken("a reservation without an account")
