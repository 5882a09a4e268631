"""A store whose fetches start late: what LimitedStore and FaultyStore share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tetri.kv.base import Fetched, KVLost, KVStore, Wanted


class DelayedStore:
    """Wraps `store`. A fetch that a subclass puts into `late` starts at its time. Never sleeps: `due` is the earliest
    of these times. `clock`: seconds."""

    def __init__(self, store: KVStore, clock: Callable[[], float]) -> None:
        self.store, self.clock = store, clock
        self.slots, self.reach = store.slots, store.reach
        self.free, self.freed, self.meet, self.counters = store.free, store.freed, store.meet, store.counters
        self.late: list[tuple[float, Wanted]] = []  # start times and fetches
        self._lost: list[Fetched] = []  # results not yet returned

    @property
    def free_slots(self) -> int:
        """How many slots `put` can use now."""
        return self.store.free_slots

    def start(self, wanted: Wanted) -> Fetched | None:
        """Start a fetch in the store."""
        return self.store.fetch(wanted)

    def stored(self) -> Iterable[Fetched]:
        """The results that the store has."""
        return self.store.fetched()

    def fetched(self) -> Iterator[Fetched]:
        lost, self._lost = self._lost, []
        yield from lost
        now = self.clock()
        due = [wanted for at, wanted in self.late if at <= now]
        self.late = [(at, wanted) for at, wanted in self.late if at > now]
        for wanted in due:
            fetched = self.start(wanted)
            if fetched is not None:
                yield fetched
        yield from self.stored()

    def due(self) -> float | None:
        theirs = self.store.due()
        times = [at for at, _ in self.late] + [0.0] * bool(self._lost)
        return min(times if theirs is None else [*times, theirs], default=None)

    def part(self, peer: str) -> None:
        gone = [wanted for _, wanted in self.late if wanted.peer == peer]
        self.late = [(at, wanted) for at, wanted in self.late if wanted.peer != peer]
        self._lost += [Fetched(wanted.ticket, problem=KVLost(f"{peer} is gone")) for wanted in gone]
        self.store.part(peer)

    def close(self) -> None:
        self.late.clear()
        self._lost.clear()
        self.store.close()
