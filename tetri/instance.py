"""The record of an instance, as a worker announces it and all other processes know it."""

from __future__ import annotations

from tetri.request import Address, Capacity, Fingerprint, Name, Reach, Record


class Instance(Record, frozen=True):
    """One start of one worker.

    incarnation   random number, drawn once per start: distinguishes a restarted worker from its predecessor
    role          which new work it takes; the only field that changes while the process runs
    inbox         address of its PULL socket
    fingerprint   of the KV bytes of its engine: KV moves only between equal ones
    reach         how other workers read its KV
    """

    iid: Name
    incarnation: int
    role: str
    inbox: Address
    fingerprint: Fingerprint
    capacity: Capacity
    reach: Reach

    def in_role(self, role: str) -> Instance:
        """Return the same instance in another role."""
        return self.changed(role=role)
