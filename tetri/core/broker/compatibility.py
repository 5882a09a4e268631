"""Which instances can exchange KV with which, and over which path: for a thousand of them without looking at every
pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tetri.instance import Instance
from tetri.policy.pairing import FAR, compatibility_key, incompatibility, path
from tetri.request import Fingerprint, Reach

Kind = tuple[Fingerprint, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """`paths`: with how many members one can exchange KV over each. `stranger`: one of the others, and why never with
    that one; empty when there is none."""

    paths: dict[str, int]
    incompatibility: str

    @property
    def total(self) -> int:
        return sum(self.paths.values())


Place = tuple[Any, ...]


@dataclass(slots=True)
class Group:
    """Members that are alike, seen from a distance, by the place where one would see them from nearer."""

    size: int = 0
    places: dict[Place, list[Instance]] = field(default_factory=dict)

    def but(self, place: Place) -> tuple[int, Instance] | None:
        """How many are elsewhere, and one of them."""
        one = next((members[0] for where, members in self.places.items() if where != place), None)
        return None if one is None else (self.size - len(self.places.get(place, ())), one)


class Compatibility:
    """Instances, grouped by all that decides how KV moves to and from them: the farther away, the less that is, and
    the fewer the groups."""

    def __init__(self, members: Iterable[Instance]) -> None:
        self._iids: dict[str, None] = {}
        self._groups: dict[Place, dict[Kind, Group]] = {}  # place -> what decides there -> who is there
        self._found: dict[Kind, Found] = {}
        for member in members:
            self._iids[member.iid] = None
            reach = member.reach
            inner: Place = ("nowhere nearer",)
            for place, facts in zip(_places(reach), _facts(reach), strict=True):
                group = self._groups.setdefault(place, {}).setdefault((member.fingerprint, facts), Group())
                group.size += 1
                group.places.setdefault(inner, []).append(member)
                inner = place

    def of(self, instance: Instance) -> Found:
        """What there is for an instance, itself included if it is a member: it can always exchange KV with itself."""
        kind = _kind(instance)
        if kind not in self._found:
            self._found[kind] = self._find(instance)
        return self._found[kind]

    def others(self, instance: Instance) -> Found:
        """The same without itself."""
        found, own = self.of(instance), path(instance.reach, instance.reach)
        if instance.iid not in self._iids or own is None:
            return found
        paths = {name: count - (name == own) for name, count in found.paths.items()}
        return Found({name: count for name, count in paths.items() if count}, found.incompatibility)

    def _find(self, instance: Instance) -> Found:
        paths: Counter[str] = Counter()
        odd = ""
        inner: Place = ()  # nothing was seen from nearer
        for place in _places(instance.reach):
            for group in self._groups.get(place, {}).values():
                found = group.but(inner)
                if found is None:
                    continue
                size, other = found
                why = incompatibility(instance.fingerprint, other.fingerprint, instance.reach, other.reach)
                name = path(instance.reach, other.reach)
                if why is None and name is not None:
                    paths[name] += size
                elif not odd:
                    odd = f"never paired with {other.iid}: {why}"
            inner = place
        return Found(dict(paths), odd)


def _kind(instance: Instance) -> Kind:
    """Instances of one kind can exchange KV with the same others."""
    return instance.fingerprint, compatibility_key(instance.reach)


def _places(reach: Reach) -> tuple[Place, ...]:
    """Where an instance is, seen from its process, from its host, and from anywhere."""
    return (reach.host, reach.process), (reach.host,), ()


def _facts(reach: Reach) -> Iterator[tuple[Any, ...]]:
    """What decides about KV in each of these places."""
    paths = tuple(reach.paths)
    yield paths, reach.device, *reach.near
    yield tuple(name for name in paths if name != "local"), reach.device, *reach.near
    yield tuple(name for name in paths if name in FAR)
