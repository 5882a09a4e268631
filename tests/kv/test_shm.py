"""What only segments in shared memory have: files that others can see, and owners that die."""

import errno
import gc
import os
import resource
from contextlib import closing, contextmanager, nullcontext, suppress

import pytest
from msgspec.structs import replace

from tests.kv.contract import StoreContract
from tests.kv.mapped import ShmWorld
from tests.kv.parties import BLOCK, SLOTS, block, end
from tetri.kv import StoreSettings, open_store, segment
from tetri.kv.base import KVError, KVLost
from tetri.kv.shm import ShmSlab, sweep


class TestShm(StoreContract):
    World = ShmWorld


def test_what_is_mapped_outlives_its_owner_and_what_is_not_is_lost(pair, tmp_path):
    sender, receiver = pair
    chunk = sender.put(block(1))
    assert receiver.fetch(chunk) == [block(1)]
    sender.kill()
    assert sweep("test", directory=str(tmp_path)) == [chunk.handle.segment]
    assert receiver.fetch(chunk) == [block(1)]
    receiver.store.part("p0")
    receiver.meet(sender)
    with pytest.raises(KVLost, match="cannot be opened"):
        receiver.fetch(chunk)


@pytest.mark.parametrize("lacks", ["descriptors", "one descriptor", "address space"])
def test_a_reader_without_descriptors_or_memory_loses_nothing_but_the_chunk(pair, monkeypatch, lacks):
    """It lives, and reads on when it has them again."""
    sender, receiver = pair
    chunk = sender.put(block(1))
    if lacks == "address space":
        monkeypatch.setattr(segment.mmap, "mmap", _no_memory)
        lacking = nullcontext()
    else:
        lacking = _descriptors_left(1 if lacks == "one descriptor" else 0)
    with lacking, pytest.raises(KVLost, match="Too many open files|Cannot allocate memory"):
        receiver.fetch(chunk)
    monkeypatch.undo()
    assert receiver.fetch(chunk) == [block(1)]


@contextmanager
def _descriptors_left(count):
    """This process has so many free descriptors. What earlier tests have left to the garbage collector frees none."""
    (soft, hard), taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    gc.collect()
    gc.disable()
    try:
        taken.append(os.open("/", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
        with suppress(OSError):
            while True:
                taken.append(os.open("/", os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def _no_memory(*what, **flags):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_segment_whose_name_others_remove_is_read_as_before(world, pair, tmp_path):
    """Also by a receiver that opens it only now. It is the same memory: what is freed is lost to all."""
    sender, receiver = pair
    chunks = [sender.put(block(1)), sender.put(block(2))]
    assert receiver.fetch(chunks[0]) == [block(1)] and sender.store.counters() == {}
    os.unlink(tmp_path / chunks[0].handle.segment)
    assert sender.store.counters() == {"segment_unlinked": 1}
    late, stranger = world.open("d1"), world.open("d2")
    late.store.meet("p0", replace(sender.store.reach, process=os.getpid()))
    stranger.meet(sender)  # the process that it was told is another one
    assert [each.fetch(chunks[1]) for each in (receiver, late)] == [[block(2)]] * 2
    with pytest.raises(KVLost, match="cannot be opened"):
        stranger.fetch(chunks[1])
    sender.free(chunks[1])
    for each in (receiver, late):
        with pytest.raises(KVLost, match="is in generation 2"):
            each.fetch(chunks[1])
    assert late.fetch(sender.put(block(3))) == [block(3)]
    sender.give_back()
    sender.close()
    assert sender.store.counters() == {}


def test_sweep_removes_the_dead_and_only_them(slab, tmp_path, monkeypatch):
    folder = str(tmp_path)
    dead = ShmSlab("test", "p0", SLOTS, BLOCK, directory=folder).segment.name
    (tmp_path / "tetri-test-not-one-of-ours").touch()
    (tmp_path / "unrelated").touch()
    assert sweep("test", directory=folder) == []
    end(dead)
    assert [sweep(*words, directory=folder) for words in (("other",), ("test", "d0"), ("te.t",))] == [[]] * 3
    with monkeypatch.context() as other:  # /dev/shm is everybody's
        other.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert sweep("test", "p0", directory=folder) == []
    assert sweep("test", "p0", directory=folder) == [dead]
    left = ["tetri-test-not-one-of-ours", "unrelated", slab.segment.name]
    assert sorted(os.listdir(folder)) == sorted(left)


def test_open_store_clears_away_what_a_killed_predecessor_left():
    settings = StoreSettings("test-open", "p0", 1, 10, "shm")
    left = open_store(settings).reach.segment
    end(left)
    assert os.path.exists(f"/dev/shm/{left}")
    with closing(open_store(settings)):
        assert not os.path.exists(f"/dev/shm/{left}")


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
