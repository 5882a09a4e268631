"""Migration policies: which running decodes go on at another instance, and where.

Two kinds of instances give decodes up: one whose role takes no decodes any more, all of them; and one that is short of
memory because its decodes write more than was predicted, the longest, until it has a free block for each of the rest.
Without that the engine would preempt one, and compute it again. An instance takes decodes only while it has a free
block for each of its own, and a place in its batch. Policies remember nothing: what is on its way counts for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetri.policy.views import DecodeInstance, RunningDecode
from tetri.request import DECODE_ROLES

AHEAD = 128  # tokens that a decode may write while its blocks move; more would only keep memory at the destination
AT_ONCE = 4  # decodes that leave an instance at the same time: each takes slots of its slab, and time between its steps
LEAST_LEFT = 16  # tokens; a decode that may write fewer is left to end where it is

Moves = list[tuple[str, str]]  # the id of a decode, and the instance where it goes on


def gives_up(role: str, running: int, free_blocks: int) -> bool:
    """Whether an instance should give up decodes."""
    return running > 0 and (free_blocks < running or role not in DECODE_ROLES)


def _gives_up(instance: DecodeInstance) -> bool:
    return gives_up(instance.role, instance.running, instance.free_blocks)


def none(instances: Sequence[DecodeInstance], decodes: Mapping[str, Sequence[RunningDecode]]) -> Moves:
    """No decode goes on elsewhere."""
    return []


def auto(instances: Sequence[DecodeInstance], decodes: Mapping[str, Sequence[RunningDecode]]) -> Moves:
    """Decodes go on at instances in the role auto."""
    return _moves(instances, decodes, ("auto",))


def everywhere(instances: Sequence[DecodeInstance], decodes: Mapping[str, Sequence[RunningDecode]]) -> Moves:
    """Decodes go on at all instances whose role takes decodes."""
    return _moves(instances, decodes, DECODE_ROLES)


def _moves(
    instances: Sequence[DecodeInstance], decodes: Mapping[str, Sequence[RunningDecode]], roles: Sequence[str]
) -> Moves:
    """`decodes`: of the instances that give some up, by id."""
    spare = {
        each.iid: each.free_blocks - each.running
        for each in instances
        if each.role in roles and each.places > 0 and not _gives_up(each)
    }
    places = {each.iid: each.places for each in instances}
    moves: Moves = []
    for source in instances:
        short, allowed = _shortage(source), AT_ONCE - source.outgoing
        for decode in sorted(decodes.get(source.iid, ()), key=lambda decode: -decode.blocks):
            if allowed <= 0 or short <= 0 or not spare:
                break
            to = max(spare, key=lambda iid: spare[iid])
            if decode.left < LEAST_LEFT or spare[to] <= decode.needs:
                continue
            moves.append((decode.id, to))
            spare[to] -= decode.needs + 1
            places[to] -= 1
            allowed, short = allowed - 1, short - decode.blocks - 1
            if not places[to]:
                del spare[to]
    return moves


def _shortage(source: DecodeInstance) -> float:
    """Blocks that an instance should give up; those of a decode count with one for its growth."""
    if not _gives_up(source):
        return 0
    leaves = source.role not in DECODE_ROLES
    return float("inf") if leaves else source.running - source.free_blocks - source.outgoing_blocks
