"""Looking at segments from outside."""

import os
import time

from tests.kv.contract_slab import nothing
from tests.kv.parties import BLOCK, SLOTS, end
from tetri.kv.segment import attach
from tetri.kv.shm import ShmSlab
from tetri.kv.survey import remove, survey


def test_a_segment_tells_its_owner_and_each_used_slot(slab, tmp_path):
    before = time.monotonic()
    first, _ = slab.put(2, nothing, "p:r1:1")
    second, _ = slab.put(1, nothing, "p:r2:7")
    slab.free(first)
    again, _ = slab.put(1, nothing, "p:r3:1")
    (seen,) = survey("test", str(tmp_path))
    assert (seen.name, seen.deployment, seen.iid) == (slab.segment.name, "test", "p0")
    assert (seen.alive, seen.pid, seen.problem) == (True, os.getpid(), "")
    assert (seen.slots, seen.block_bytes, seen.size) == (SLOTS, BLOCK, os.stat(tmp_path / seen.name).st_size)
    used = {second.slots[0]: ("p:r2:7", 1), again.slots[0]: ("p:r3:1", 2)}
    assert {page.slot: (page.owner, page.generation) for page in seen.pages} == used
    elapsed = time.monotonic() - before
    assert all(0 <= page.age_s <= elapsed for page in seen.pages)
    assert seen.oldest_s == max(page.age_s for page in seen.pages) <= seen.age_s


def test_a_slot_that_is_sent_on_is_used_although_its_request_has_left(slab, tmp_path):
    nameless, _ = slab.put(2, nothing)
    assert [page.owner for page in survey("test", str(tmp_path))[0].pages] == ["", ""]
    slab.free(nameless)
    handle, _ = slab.put(1, nothing, "p:r1:1")
    slab.keep(handle)
    slab.free(handle)
    (seen,) = survey("test", str(tmp_path))
    assert [page.owner for page in seen.pages] == ["p:r1:1"]
    slab.let_go(handle)
    assert survey("test", str(tmp_path))[0].pages == ()


def test_what_a_killed_owner_left_says_whose_it_was_and_can_be_removed(slab, tmp_path):
    dead = ShmSlab("test", "p-1", SLOTS, BLOCK, directory=str(tmp_path))
    dead.put(1, nothing, "p:r1:1")
    end(dead.segment.name)
    seen = {seen.iid: seen for seen in survey("test", str(tmp_path))}
    assert {iid: (each.name, each.alive, [page.owner for page in each.pages]) for iid, each in seen.items()} == {
        "p0": (slab.segment.name, True, []),
        "p-1": (dead.segment.name, False, ["p:r1:1"]),
    }
    assert [remove(seen[iid], str(tmp_path)) for iid in ("p0", "p-1", "p-1")] == [False, True, False]
    assert [left.iid for left in survey("test", str(tmp_path))] == ["p0"]


def test_a_segment_without_a_name_is_found_while_its_owner_lives(slab, tmp_path):
    slab.put(1, nothing, "p:r1:1")
    os.unlink(tmp_path / slab.segment.name)
    reader = attach(str(tmp_path), "test", slab.segment.name, os.getpid())
    (seen,) = survey("test", str(tmp_path))
    assert (seen.name, seen.iid, seen.alive, seen.unlinked) == (slab.segment.name, "p0", True, True)
    assert [page.owner for page in seen.pages] == ["p:r1:1"]
    assert survey("test", "/dev/shm") == survey("other", str(tmp_path)) == []
    end(slab.segment.name + " (deleted)")
    assert survey("test", str(tmp_path)) == []
    reader.close()


def test_deployments_whose_names_begin_alike_are_told_apart(tmp_path):
    folder = str(tmp_path)
    slabs = [ShmSlab(*words, SLOTS, BLOCK, directory=folder) for words in (("a", "b-c"), ("a-b", "c"), ("a", "p0"))]
    assert [(seen.deployment, seen.iid) for seen in survey("a", folder)] == [("a", "b-c"), ("a", "p0")]
    assert [(seen.deployment, seen.iid) for seen in survey("a-b", folder)] == [("a-b", "c")]
    assert [seen.alive for seen in survey(None, folder)] == [True] * 3, "looking disturbs no owner"
    for slab in slabs:
        slab.close()
    assert survey(None, folder) == []


def test_a_file_that_is_no_segment_of_this_version_is_reported_as_such(slab, tmp_path):
    (tmp_path / "tetri-test-p1-0123456789abcdef").write_bytes(b"tetri-kv\1\0\0\0" + bytes(4096))
    for name in ("test-p2-0123456789abcdef", "other-p2-0123456789abcdef", "test-nothing-of-ours"):
        (tmp_path / f"tetri-{name}").write_bytes(b"")
    (tmp_path / "tetri-test-p3-0123456789abcdef").mkdir()
    (tmp_path / "tetri-test-p4-0123456789abcdef").symlink_to(tmp_path / slab.segment.name)
    found = {seen.name: seen for seen in survey("test", str(tmp_path)) if seen.problem}
    assert sorted(found) == ["tetri-test-p1-0123456789abcdef", "tetri-test-p2-0123456789abcdef"]
    assert "version 2" in found["tetri-test-p1-0123456789abcdef"].problem
    assert not any(seen.alive or seen.pages for seen in found.values())
