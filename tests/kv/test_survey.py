"""Looking at segments from outside."""

import os
import subprocess
import sys
import time

import pytest

from tests.kv.contract_slab import nothing
from tests.kv.mapped import BLOCK, SLOTS
from tetri.kv.shm import ShmSlab
from tetri.kv.survey import remove, survey

OWNER = """
import sys
from tetri.kv.shm import ShmSlab
slab = ShmSlab("test", "p-1", 4, 100, directory=sys.argv[1])
slab.put(1, lambda views: None, "p:r1:1")
print(slab.segment.name, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def dead(tmp_path):
    """The segment and the process id of an owner that was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        name = child.stdout.readline().strip()
        child.kill()
    return name, child.pid


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


def test_what_a_killed_owner_left_says_whose_it_was_and_can_be_removed(slab, dead, tmp_path):
    name, pid = dead
    seen = {seen.iid: seen for seen in survey("test", str(tmp_path))}
    assert seen.keys() == {"p0", "p-1"}
    assert (seen["p-1"].name, seen["p-1"].alive, seen["p-1"].pid) == (name, False, pid)
    assert [page.owner for page in seen["p-1"].pages] == ["p:r1:1"]
    assert not remove(seen["p0"], str(tmp_path)), "it lives"
    assert remove(seen["p-1"], str(tmp_path)) and not remove(seen["p-1"], str(tmp_path))
    assert [left.iid for left in survey("test", str(tmp_path))] == ["p0"]


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
