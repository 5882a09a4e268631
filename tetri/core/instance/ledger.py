"""The ledger of an engine's KV blocks, shared by prefill and decode. Each engine request has an account; the engine
never holds more blocks for it than the account contains."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tetri.core.actions import Broken


class Ledger:
    """`capacity` blocks in all. *Reserved* requests (granted, not running yet) together hold at most `reserve_share` of
    them, so that waiting prompts never starve running decodes. A single reservation may be larger, otherwise a long
    prompt could never be served.

    free       blocks in no account; negative when running requests need more than the engine has, which then preempts
    reserved   blocks in accounts of reserved requests
    """

    def __init__(self, capacity: int, reserve_share: float) -> None:
        self.capacity = capacity
        self.reserve_limit = int(capacity * reserve_share)
        self.free = capacity
        self.reserved = 0
        self._blocks: dict[str, int] = {}
        self._reserved: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: str) -> bool:
        return key in self._blocks

    def allocate(self, key: str, blocks: int) -> bool:
        """Open an account for an engine request that will run. Return False when too few blocks are free."""
        if key in self._blocks:
            raise Broken(f"account {key} opened twice")
        if blocks > self.free:
            return False
        self._blocks[key] = blocks
        self.free -= blocks
        return True

    def crowded(self, blocks: int) -> bool:
        """Return whether a reservation of `blocks` would exceed the share of reserved requests."""
        return self.reserved > 0 and self.reserved + blocks > self.reserve_limit

    def grantable(self, kept: int = 0) -> int:
        """Return the size of the largest reservation that can be made now, if `kept` blocks stay free."""
        most = self.free - kept
        return max(min(most, self.reserve_limit - self.reserved) if self.reserved else most, 0)

    def reserve(self, keys: Collection[str], blocks: int, kept: int = 0) -> bool:
        """Open an account of `blocks` for each of some requests that wait for the same KV, if `kept` blocks stay free.
        Return whether they are open: all or none."""
        total = blocks * len(keys)
        if self.crowded(total) or total + kept > self.free:
            return False
        for key in keys:
            self.allocate(key, blocks)
            self._reserved[key] = None
        self.reserved += total
        return True

    def hand_on(self, key: str, decode_key: str) -> None:
        """Turn the account of a prefill that stays into the reservation of its decode request."""
        blocks = self._blocks[decode_key] = self._blocks.pop(key)
        self._reserved[decode_key] = None
        self.reserved += blocks

    def run(self, key: str) -> None:
        """Turn a reservation into the account of a running request."""
        del self._reserved[key]
        self.reserved -= self._blocks[key]

    def grow(self, key: str, blocks: int) -> None:
        """Increase an account to `blocks`; a larger one stays as it is."""
        more = blocks - self._blocks[key]
        if more > 0:
            self._blocks[key] = blocks
            self.free -= more

    def close(self, key: str) -> None:
        """Close an account, if it is open."""
        blocks = self._blocks.pop(key, 0)
        self.free += blocks
        if key in self._reserved:
            del self._reserved[key]
            self.reserved -= blocks

    def check(self, held: Iterable[tuple[str, int]]) -> None:
        """Raise Broken when the engine holds more blocks for a request than its account contains."""
        accounts = self._blocks
        for key, blocks in held:
            if blocks > accounts.get(key, 0):
                raise Broken(f"the engine holds {blocks} blocks for {key}, the ledger {accounts.get(key, 0)}")

    def audit(self) -> None:
        """Raise Broken when `free` or `reserved` disagrees with the accounts."""
        if any(key not in self._blocks for key in self._reserved):
            raise Broken("a reservation without an account")
        free = self.capacity - sum(self._blocks.values())
        reserved = sum(self._blocks[key] for key in self._reserved)
        if (free, reserved) != (self.free, self.reserved):
            raise Broken(f"{self.free} blocks free and {self.reserved} reserved, counted {free} and {reserved}")
