"""The slab in host memory."""

import time

import pytest

from tests.kv.contract_slab import SlabContract, nothing, slab_histories
from tests.kv.parties import BLOCK, SLOTS
from tetri.kv.local import LocalSlab
from tetri.kv.slab import MARK, OWNER_BYTES, HostSlab, Segment


class TestHostSlab(SlabContract):
    """In shared memory."""


TestHistories = slab_histories(lambda: LocalSlab("p0", SLOTS, BLOCK, {}))


def marks(slab):
    """slot -> (when it was put, its owner), of those that are marked."""
    cells = [MARK.unpack_from(slab.segment.marks, slot * MARK.size) for slot in range(slab.slots)]
    return {slot: (since, owner.rstrip(b"\0").decode()) for slot, (since, owner) in enumerate(cells) if since}


def test_a_used_slot_says_whose_it_is_until_both_owners_have_let_go(slab):
    before = time.monotonic_ns()
    handle, _ = slab.put(2, nothing, "p:r1:1")
    found = marks(slab)
    assert {slot: owner for slot, (_, owner) in found.items()} == dict.fromkeys(handle.slots, "p:r1:1")
    assert all(before <= since <= time.monotonic_ns() for since, _ in found.values())
    slab.keep(handle)
    slab.free(handle)
    assert marks(slab) == found
    slab.let_go(handle)
    assert marks(slab) == {}
    assert bytes(slab.segment.marks) == bytes(len(slab.segment.marks)), "not even the name is left"


def test_an_owner_of_any_length_is_cut_to_its_place_and_a_failed_write_has_none(slab):
    for owner in ("", "ü" * 100, "x" * 1000, "\ud800"):
        handle, _ = slab.put(SLOTS, nothing, owner)
        cell = MARK.unpack_from(slab.segment.marks, MARK.size)[1]
        assert cell == owner.encode(errors="replace")[:OWNER_BYTES].ljust(OWNER_BYTES, b"\0")
        slab.free(handle)
        assert marks(slab) == {}
    with pytest.raises(ZeroDivisionError):
        slab.put(2, lambda views: 1 / 0, "p:r1:1")
    assert marks(slab) == {}
    memory = bytearray(SLOTS * 8 + SLOTS * BLOCK)
    views = memoryview(memory)
    slab = HostSlab(Segment("bare", SLOTS, BLOCK, views[: SLOTS * 8].cast("Q"), views[SLOTS * 8 :]))
    handle, _ = slab.put(SLOTS, nothing, "p:r1:1")
    slab.free(handle)
    assert slab.free_slots == SLOTS
