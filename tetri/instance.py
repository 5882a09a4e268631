"""What an instance is, as a worker says it of itself and everybody else knows it."""

from __future__ import annotations

from msgspec.structs import replace

from tetri.request import Address, Capacity, Fingerprint, Name, Reach, Record


class Instance(Record, frozen=True):
    """One start of one worker. `incarnation` is random, drawn once per start: it tells a restarted worker from its
    predecessor. `role`: which new work it takes; the only field that changes while the process lives. `inbox`: the
    address of its PULL socket. `reach`: how others read its KV."""

    iid: Name
    incarnation: int
    role: str
    inbox: Address
    fingerprint: Fingerprint
    capacity: Capacity
    reach: Reach

    def in_role(self, role: str) -> Instance:
        return replace(self, role=role)
