"""A worker's KV store: one slab, from which all of its KV chunks are sent, and one reader for each path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from tetri.instance import Reach
from tetri.kv.base import Fetched, KVLost, Reader, Slab, Wanted


class Store:
    """A slab and its readers. `readers`: path -> reader. `home` reads the worker's own slab (path `local`), for
    mixed workers. `due` is of a reader that does not wake the worker. `counted`: path -> what returns the counters of
    that path, for those that count."""

    def __init__(
        self,
        slab: Slab,
        readers: dict[str, Reader],
        reach: Reach,
        home: Reader,
        due: Callable[[], float | None] = lambda: None,
        counted: Mapping[str, Callable[[], Mapping[str, int]]] = MappingProxyType({}),
    ) -> None:
        self.counted = counted
        self.slab, self.readers, self.reach = slab, {"local": home, **readers}, reach
        self.slots, self._due = slab.slots, due
        self.put, self.free, self.freed = slab.put, slab.free, slab.freed

    @property
    def free_slots(self) -> int:
        """How many slots `put` can use now."""
        return self.slab.free_slots

    def meet(self, peer: str, reach: Reach) -> None:
        for path, reader in self.readers.items():
            if path in reach.paths:
                reader.meet(peer, reach)

    def part(self, peer: str) -> None:
        for reader in self.readers.values():
            reader.part(peer)

    def fetch(self, wanted: Wanted) -> Fetched | None:
        reader = self.readers.get(wanted.path)
        if reader is None:
            return Fetched(wanted.ticket, problem=KVLost(f"this worker has no KV path {wanted.path!r}"))
        return reader.fetch(wanted)

    def fetched(self) -> Iterable[Fetched]:
        for reader in self.readers.values():
            yield from reader.fetched()

    def counters(self) -> dict[str, int]:
        paths = {f"{path}_{name}": n for path, counted in self.counted.items() for name, n in counted().items()}
        return {**self.slab.counters(), **paths}

    def due(self) -> float | None:
        return self._due()

    def close(self) -> None:
        """Close the readers, then the slab. A second call does nothing."""
        for reader in self.readers.values():
            reader.close()
        self.slab.close()
