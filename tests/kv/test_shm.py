"""What only segments in shared memory have: files that others can see, and owners that die."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tests.kv.contract import StoreContract
from tests.kv.mapped import BLOCK, SLOTS, ShmWorld
from tests.kv.parties import block
from tetri.kv import StoreSettings, open_store
from tetri.kv.base import KVError, KVLost
from tetri.kv.shm import ShmSlab, sweep
from tetri.wire.handover import Handle

OWNER = """
import sys
from tests.kv.mapped import BLOCK, SLOTS
from tests.kv.parties import block
from tetri.kv.shm import ShmSlab
slab = ShmSlab("test", "p0", 4, 100, directory=sys.argv[1])
def write(views):
    for number, view in enumerate(views):
        view[:] = block(number)
handle, digest = slab.put(3, write, "p:r1:1")
print(handle.segment, *handle.slots, *handle.generations, digest, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process with three blocks put: (process, handle, digest)."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            segment, *numbers = child.stdout.readline().split()
            *rest, digest = map(int, numbers)
            handle = Handle(segment=segment, slots=rest[:3], generations=rest[3:], block_bytes=BLOCK)
            yield child, handle, digest
        finally:
            child.kill()


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.wait()


class TestShm(StoreContract):
    World = ShmWorld


def test_what_is_mapped_outlives_its_owner_and_what_is_not_is_lost(peer, owner, tmp_path):
    child, handle, digest = owner
    peer.meet(handle.segment)
    assert peer.fetch(handle, digest) == [block(0), block(1), block(2)]
    kill(child)
    assert sweep("test", directory=str(tmp_path)) == [handle.segment]
    assert peer.fetch(handle, digest)[0] == block(0)
    peer.reader.part("p0")
    peer.meet(handle.segment)
    with pytest.raises(KVLost, match="cannot be opened"):
        peer.fetch(handle, digest)


def test_sweep_removes_the_dead_and_only_them(slab, owner, tmp_path):
    child, handle, _ = owner
    folder = str(tmp_path)
    (tmp_path / "tetri-test-not-one-of-ours").touch()
    (tmp_path / "unrelated").touch()
    assert sweep("test", directory=folder) == []
    kill(child)
    assert [sweep(*words, directory=folder) for words in (("other",), ("test", "d0"), ("te.t",))] == [[]] * 3
    assert sweep("test", "p0", directory=folder) == [handle.segment]
    left = ["tetri-test-not-one-of-ours", "unrelated", slab.segment.name]
    assert sorted(os.listdir(folder)) == sorted(left)


def test_open_store_clears_away_what_a_killed_predecessor_left():
    script = (
        "from tetri.kv import StoreSettings, open_store; store = open_store(StoreSettings('test-open', 'p0', 1, 10,"
    )
    command = [sys.executable, "-c", f"{script} 'shm')); print(store.reach.segment, flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        left = child.stdout.readline().strip()
        kill(child)
    assert os.path.exists(f"/dev/shm/{left}")
    store = open_store(StoreSettings("test-open", "p0", 1, 10, "shm"))
    assert not os.path.exists(f"/dev/shm/{left}")
    store.close()


def test_close_leaves_nothing_even_while_a_view_is_kept(tmp_path):
    slab = ShmSlab("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
    kept = []
    slab.put(1, kept.extend)
    slab.close()
    assert os.listdir(tmp_path) == []
    kept[0][:] = block(7)  # no crash: the memory goes with its last view
    with pytest.raises(KVError, match=r"too small for 1000000 slots .* 1,000,0\d\d MB needed, [\d,]+ MB free"):
        ShmSlab("test", "p0", 1_000_000, 1 << 20, directory=str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_segment_is_named_after_its_owner_private_and_not_to_be_guessed(slab, tmp_path):
    name = slab.segment.name
    prefix, digits = name.rsplit("-", 1)
    assert prefix == "tetri-test-p0" and len(digits) == 16 and int(digits, 16) >= 0
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    other = ShmSlab("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
    assert other.segment.name != name
    other.close()


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "too small"), (errno.EFBIG, "cannot reserve")])
def test_room_taken_by_others_in_between_is_the_same_error(tmp_path, monkeypatch, number, says):
    def refuse(descriptor, start, size):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(KVError, match=says):
        ShmSlab("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_a_slab_is_refused(tmp_path):
    names = [("a/b", "p0"), ("", "p0"), ("a", "p 0"), ("a", "x" * 99)]
    for made in (*((*name, 1, 1) for name in names), ("a", "b", 0, 1), ("a", "b", 1, 0)):
        with pytest.raises(KVError):
            ShmSlab(*made, directory=str(tmp_path))
        assert os.listdir(tmp_path) == []
    with pytest.raises(KVError, match="cannot be made"):
        ShmSlab("test", "p0", 1, 1, directory=str(tmp_path / "nowhere"))
