import errno
import os
import signal
import struct
import subprocess
import sys

import pytest

from tests.kv.slabs import block, replaced, writer
from tetri.kv import open_store
from tetri.kv.base import KVError, KVLost
from tetri.kv.shm import ShmStore, sweep
from tetri.wire.messages import Handle

SLOTS, BLOCK = 4, 100

OWNER = """
import sys
from tetri.kv.shm import ShmStore
store = ShmStore("test", "p0", 4, 100, directory=sys.argv[1])
def write(views):
    for number, view in enumerate(views):
        view[:] = bytes([number + 1]) * 100
handle, digest = store.put(3, write)
print(handle.segment, *handle.slots, *handle.generations, digest, flush=True)
sys.stdin.readline()
store.free(handle)
print("freed", flush=True)
sys.stdin.readline()
store.close()
"""


@pytest.fixture
def shm(tmp_path):
    """A store in a folder of its own; a real file system does for shared memory."""
    store = ShmStore("test", "d0", SLOTS, BLOCK, directory=str(tmp_path))
    yield store
    store.close()


@pytest.fixture
def owner(tmp_path):
    """Another process with three blocks put: (process, handle, digest)."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            segment, *numbers = child.stdout.readline().split()
            *rest, digest = map(int, numbers)
            yield (
                child,
                Handle(segment=segment, slots=rest[:3], generations=rest[3:], block_bytes=BLOCK),
                digest,
            )
        finally:
            child.kill()


def say(child):
    child.stdin.write("\n")
    child.stdin.flush()


def test_blocks_of_another_process(shm, owner):
    child, handle, digest = owner
    assert [bytes(view) for view in shm.take(handle, digest)] == [block(1), block(2), block(3)]
    say(child)
    assert child.stdout.readline() == "freed\n"
    with pytest.raises(KVLost, match="generation 2"):
        shm.take(handle, digest)


def test_what_is_mapped_outlives_its_owner_and_what_is_not_is_lost(shm, owner, tmp_path):
    child, handle, digest = owner
    shm.take(handle, digest)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert sweep("test", directory=str(tmp_path)) == [handle.segment]
    assert bytes(shm.take(handle, digest)[0]) == block(1)
    shm.forget(handle.segment)
    with pytest.raises(KVLost, match="cannot be opened"):
        shm.take(handle, digest)
    shm.forget(handle.segment)


def test_sweep_removes_the_dead_and_only_them(shm, owner, tmp_path):
    child, handle, _ = owner
    folder = str(tmp_path)
    (tmp_path / "tetri-test-not-one-of-ours").touch()
    (tmp_path / "unrelated").touch()
    assert sweep("test", directory=folder) == []
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert sweep("other", directory=folder) == []
    assert sweep("test", "d0", directory=folder) == []
    assert sweep("te.t", directory=folder) == []
    assert sweep("test", "p0", directory=folder) == [handle.segment]
    assert sorted(os.listdir(folder)) == sorted(["tetri-test-not-one-of-ours", "unrelated", shm.segment])


def test_close_leaves_nothing_even_while_a_view_is_kept(tmp_path):
    store = ShmStore("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
    kept = []
    store.put(1, kept.extend)
    store.close()
    assert os.listdir(tmp_path) == []
    kept[0][:] = block(7)  # no crash: the memory goes with its last view


def test_the_segment_is_named_after_its_owner_and_private(shm, tmp_path):
    prefix, digits = shm.segment.rsplit("-", 1)
    assert prefix == "tetri-test-d0" and len(digits) == 16
    assert (tmp_path / shm.segment).stat().st_mode & 0o777 == 0o600


def test_the_default_folder_is_shared_memory():
    store = ShmStore("test-default", "p0", 1, 10)
    assert os.path.exists(f"/dev/shm/{store.segment}")
    store.close()
    assert not os.path.exists(f"/dev/shm/{store.segment}")


def test_too_little_room_is_an_error_at_the_start_that_names_it(tmp_path):
    with pytest.raises(KVError, match=r"too small for 1000000 slots .* 1,000,008 MB needed, [\d,]+ MB free"):
        ShmStore("test", "p0", 1_000_000, 1 << 20, directory=str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "too small"), (errno.EFBIG, "cannot reserve")])
def test_room_taken_by_others_in_between_is_the_same_error(tmp_path, monkeypatch, number, says):
    def refuse(descriptor, start, size):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(KVError, match=says):
        ShmStore("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("deployment", "iid", "slots", "size"),
    [
        ("a/b", "p0", 1, 1),
        ("", "p0", 1, 1),
        ("a", "p 0", 1, 1),
        ("a", "x" * 99, 1, 1),
        ("a", "b", 0, 1),
        ("a", "b", 1, 0),
    ],
)
def test_what_cannot_be_a_slab_is_refused(tmp_path, deployment, iid, slots, size):
    with pytest.raises(KVError):
        ShmStore(deployment, iid, slots, size, directory=str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(KVError, match="cannot be made"):
        ShmStore("test", "p0", 1, 1, directory=str(tmp_path / "nowhere"))


def _header(magic=b"tetri-kv", version=1, blocks_at=4096, block_bytes=BLOCK, slots=SLOTS):
    return struct.pack("=8sIIQQ", magic, version, blocks_at, block_bytes, slots)


RIGHT_SIZE = 4096 + SLOTS * BLOCK
FALSE_SEGMENTS = {
    "empty": b"",
    "short": b"tetri-kv",
    "not finished": bytes(RIGHT_SIZE),
    "other magic": _header(magic=b"tetri-vk").ljust(RIGHT_SIZE, b"\0"),
    "other version": _header(version=2).ljust(RIGHT_SIZE, b"\0"),
    "too many slots": _header(slots=SLOTS + 1).ljust(RIGHT_SIZE, b"\0"),
    "endless slots": _header(slots=(1 << 64) - 1).ljust(RIGHT_SIZE, b"\0"),
    "endless blocks": _header(block_bytes=(1 << 64) - 1).ljust(RIGHT_SIZE, b"\0"),
    "no slots": _header(slots=0).ljust(4096, b"\0"),
    "blocks over the header": _header(blocks_at=0).ljust(SLOTS * BLOCK, b"\0"),
    "truncated": _header().ljust(RIGHT_SIZE - 1, b"\0"),
}


@pytest.mark.parametrize("content", FALSE_SEGMENTS.values(), ids=FALSE_SEGMENTS.keys())
def test_a_false_segment_is_lost_not_read(shm, tmp_path, content):
    (tmp_path / "tetri-test-p0-false").write_bytes(content)
    handle, digest = shm.put(1, writer(block(1)))
    with pytest.raises(KVLost):
        shm.take(replaced(handle, segment="tetri-test-p0-false"), digest)


def test_a_segment_that_is_no_plain_file_is_lost(shm, tmp_path):
    handle, digest = shm.put(1, writer(block(1)))
    (tmp_path / "tetri-test-link").symlink_to(tmp_path / shm.segment)
    (tmp_path / "tetri-test-folder").mkdir()
    os.mkfifo(tmp_path / "tetri-test-pipe")  # opening it must not wait for a writer
    for name in ("tetri-test-link", "tetri-test-folder", "tetri-test-pipe", "tetri-test-/" + shm.segment):
        with pytest.raises(KVLost):
            shm.take(replaced(handle, segment=name), digest)


def test_a_peer_is_mapped_once_and_read_only(shm, tmp_path):
    sender = ShmStore("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
    handle, digest = sender.put(1, writer(block(1)))
    shm.take(handle, digest)
    mapping = shm._peers[handle.segment]
    assert mapping.segment.blocks.readonly
    shm.take(handle, digest)
    assert shm._peers == {handle.segment: mapping}
    sender.close()


def test_a_chunk_larger_than_any_before_grows_the_staging(tmp_path, shm):
    sender = ShmStore("test", "p0", 64, 1000, directory=str(tmp_path))
    handle, digest = sender.put(64, lambda views: [view.__setitem__(0, at) for at, view in enumerate(views)])
    assert [view[0] for view in shm.take(handle, digest)] == list(range(64))
    sender.close()


def test_a_restarted_peers_old_segment_is_let_go(shm, tmp_path):
    names = []
    for _ in range(3):
        sender = ShmStore("test", "p0", SLOTS, BLOCK, directory=str(tmp_path))
        shm.take(*sender.put(1, writer(block(1))))
        names.append(sender.segment)
        sender.close()
    other = ShmStore("test", "p1", SLOTS, BLOCK, directory=str(tmp_path))
    shm.take(*other.put(1, writer(block(1))))
    assert list(shm._peers) == [names[-1], other.segment]
    other.close()


def test_open_store_clears_away_what_a_killed_predecessor_left():
    script = (
        "from tetri.kv import open_store; store = open_store('shm', 'test-open', 'p0', 1, 10);"
        "print(store.segment, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        left = child.stdout.readline().strip()
        child.kill()
    assert os.path.exists(f"/dev/shm/{left}")
    store = open_store("shm", "test-open", "p0", 1, 10)
    assert not os.path.exists(f"/dev/shm/{left}")
    store.close()
