"""KV compatibility: which instances can exchange KV, and over which path. Instances are grouped, so that a cluster of
a thousand needs no comparison of every pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tetri.instance import Fingerprint, Instance, Reach
from tetri.policy.pairing import FAR, compatibility_key, incompatibility, path

Kind = tuple[Fingerprint, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """`paths`: number of members that an instance can exchange KV with, by path. `incompatibility`: names one member
    that it can never exchange KV with, and the reason; "" if there is none."""

    paths: dict[str, int]
    incompatibility: str

    @property
    def total(self) -> int:
        """Number of compatible members over all paths."""
        return sum(self.paths.values())


Place = tuple[Any, ...]


@dataclass(slots=True)
class Group:
    """Members of one place with equal properties, divided by the next narrower place: a group of one host is divided
    by process, a group of the whole cluster by host."""

    size: int = 0
    places: dict[Place, list[Instance]] = field(default_factory=dict)

    def but(self, place: Place) -> tuple[int, Instance] | None:
        """The number of members outside `place` and one of them; None if there is none."""
        one = next((members[0] for where, members in self.places.items() if where != place), None)
        return None if one is None else (self.size - len(self.places.get(place, ())), one)


class Compatibility:
    """Instances, grouped by the properties that decide how KV moves to and from them. From another host fewer
    properties matter than within one process, so there are fewer groups to compare."""

    def __init__(self, members: Iterable[Instance]) -> None:
        self._iids: dict[str, None] = {}
        self._groups: dict[Place, dict[Kind, Group]] = {}  # place -> deciding properties -> members
        self._found: dict[Kind, Found] = {}
        self._others: dict[str, Found] = {}
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
        """The members compatible with an instance. A member counts itself too: KV can always move within it."""
        kind = instance.fingerprint, compatibility_key(instance.reach)  # equal: compatible with the same members
        if kind not in self._found:
            self._found[kind] = self._find(instance)
        return self._found[kind]

    def others(self, instance: Instance) -> Found:
        """As `of`, without the instance itself."""
        if instance.iid not in self._iids:
            return self.of(instance)
        if instance.iid not in self._others:
            self._others[instance.iid] = self._without(instance)
        return self._others[instance.iid]

    def _without(self, instance: Instance) -> Found:
        found, own = self.of(instance), path(instance.reach, instance.reach)
        if own is None:
            return found
        paths = {name: count - (name == own) for name, count in found.paths.items()}
        return Found({name: count for name, count in paths.items() if count}, found.incompatibility)

    def _find(self, instance: Instance) -> Found:
        paths: Counter[str] = Counter()
        odd = ""
        inner: Place = ()  # equals no narrower place: the innermost groups are counted whole
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


def compatible_pairs(prefillers: Iterable[Instance], decoders: Iterable[Instance]) -> list[tuple[str, str]]:
    """The ids of all pairs that can exchange KV. Instances of equal properties are compared once. An instance can
    always exchange KV with itself."""
    answers: dict[tuple[int, int], bool] = {}
    numbers: dict[Kind, int] = {}

    def number(each: Instance) -> int:
        return numbers.setdefault((each.fingerprint, compatibility_key(each.reach)), len(numbers))

    found: list[tuple[str, str]] = []
    numbered = [(number(each), each) for each in decoders]
    for prefill in prefillers:
        own = number(prefill)
        for other, decode in numbered:
            if (own, other) not in answers:
                why = incompatibility(prefill.fingerprint, decode.fingerprint, prefill.reach, decode.reach)
                answers[own, other] = why is None
            if answers[own, other] or prefill.iid == decode.iid:
                found.append((prefill.iid, decode.iid))
    return found


def _places(reach: Reach) -> tuple[Place, ...]:
    """The places that contain an instance, the narrowest first: its process, its host, the cluster."""
    return (reach.host, reach.process), (reach.host,), ()


def _facts(reach: Reach) -> Iterator[tuple[Any, ...]]:
    """The properties that decide how KV moves within each of these places."""
    paths = tuple(reach.paths)
    yield paths, reach.device, *reach.near
    yield tuple(name for name in paths if name != "local"), reach.device, *reach.near
    yield tuple(name for name in paths if name in FAR)
