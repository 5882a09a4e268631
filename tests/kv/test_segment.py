"""Mapping the segments of others: what is no segment harms no reader, and what is mapped is let go."""

import os
import struct
import time

import pytest
from msgspec.structs import replace

from tests.kv.mapped import put
from tests.kv.parties import BLOCK, SLOTS, Chunk, block
from tetri.instance import Reach
from tetri.kv.base import KVForeign, KVLost
from tetri.kv.segment import VERSION
from tetri.wire.handover import Handle

BLOCKS_AT = 4096


def _header(magic=b"tetri-kv", version=VERSION, blocks_at=BLOCKS_AT, block_bytes=BLOCK, slots=SLOTS):
    return struct.pack("=8sIIQQIIQ16x", magic, version, blocks_at, block_bytes, slots, 1, 4, 1)


RIGHT_SIZE = BLOCKS_AT + SLOTS * BLOCK
FALSE_HEADERS = {
    "magic": [b"tetri-vk"],
    "version": [1, VERSION + 1],
    "slots": [SLOTS + 1, (1 << 64) - 1, 0],
    "block_bytes": [(1 << 64) - 1, 0],
    "blocks_at": [0],
}
FALSE_SEGMENTS = [b"", b"tetri-kv", _header()[:-1], bytes(RIGHT_SIZE), _header().ljust(RIGHT_SIZE - 1, b"\0")]
FALSE_SEGMENTS += [_header(**{name: x}).ljust(RIGHT_SIZE, b"\0") for name, xs in FALSE_HEADERS.items() for x in xs]


@pytest.fixture
def fetch(world):
    """What a receiver gets of a peer that names its segment so."""
    receiver = world.open("d0")

    def fetch(name):
        receiver.store.meet("p0", Reach(paths=["shm"], host="here", process=1, segment=name))
        handle = Handle(segment=name, slots=[0], generations=[0], block_bytes=BLOCK)
        return receiver.fetch(Chunk("p0", handle, None, ()))

    return fetch


def test_the_header_that_these_tests_forge_can_be_right(fetch, tmp_path):
    (tmp_path / "tetri-test-p0-right").write_bytes(_header().ljust(RIGHT_SIZE, b"\0"))
    assert fetch("tetri-test-p0-right") == [bytes(BLOCK)]


@pytest.mark.parametrize("content", FALSE_SEGMENTS, ids=range(len(FALSE_SEGMENTS)))
def test_a_false_segment_is_lost_not_read(fetch, tmp_path, content):
    (tmp_path / "tetri-test-p0-false").write_bytes(content)
    with pytest.raises(KVLost):
        fetch("tetri-test-p0-false")


def test_a_segment_that_is_no_plain_file_is_lost(fetch, slab, tmp_path):
    (tmp_path / "tetri-test-link").symlink_to(tmp_path / slab.segment.name)
    (tmp_path / "tetri-test-folder").mkdir()
    os.mkfifo(tmp_path / "tetri-test-pipe")  # opening it must not wait for a writer
    for name, says in (("link", "cannot be opened"), ("folder", "not a file"), ("pipe", "not a file")):
        with pytest.raises(KVLost, match=says):
            fetch(f"tetri-test-{name}")


FALSE_NAMES = ["", "x", "../x", "tetri-other-p0-1", *(f"tetri-test-{x}" for x in ("/x", "\0", "\ud800", "x" * 9999))]


@pytest.mark.parametrize("name", FALSE_NAMES, ids=range(len(FALSE_NAMES)))
def test_a_peer_that_says_it_has_a_segment_of_no_such_name_is_lost(fetch, name):
    with pytest.raises(KVLost, match="is no segment of this deployment") as caught:
        fetch(name)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_a_peer_is_mapped_read_only_and_until_parted_from(pair):
    sender, receiver = pair
    chunk = sender.put(block(1))

    def mapped():
        """How this process has mapped the segment: its owner, and its reader."""
        with open("/proc/self/maps") as maps:
            return sorted(line.split()[1] for line in maps if chunk.handle.segment in line)

    for _ in range(2):
        receiver.fetch(chunk)
        assert mapped() == ["r--s", "rw-s"]
    with pytest.raises(KVForeign):
        receiver.fetch(chunk, handle=replace(chunk.handle, segment="tetri-test-p0-0123456789abcdef"))
    receiver.store.part("p0")
    assert mapped() == ["rw-s"]


def test_the_file_is_laid_out_as_the_protocol_says(slab, tmp_path):
    """docs/protocol.md, section 8: read here by its offsets alone."""
    before = time.monotonic_ns()
    handle, _ = put(slab, block(1), block(2))
    slab.keep(handle)
    name = slab.segment.name
    data = (tmp_path / name).read_bytes()
    magic, version, start, size, slots, pid, words, made = struct.unpack_from("=8sIIQQIIQ", data)
    assert (magic, version, size, slots, pid) == (b"tetri-kv", 2, BLOCK, SLOTS, os.getpid())
    assert start == -(-(64 + 72 * slots) // 4096) * 4096 and len(data) == start + slots * size
    assert name[len("tetri-") :][: words + 1] == "test-" and made <= before and data[48:64] == bytes(16)
    generations = struct.unpack_from(f"={slots}Q", data, 64)
    assert [generations[slot] for slot in handle.slots] == handle.generations
    marks = [struct.unpack_from("=Q56s", data, 64 + 8 * slots + 64 * slot) for slot in range(slots)]
    assert [slot for slot, (since, _) in enumerate(marks) if since >= before] == sorted(handle.slots)
    found = [data[start + slot * size : start + (slot + 1) * size] for slot in handle.slots]
    assert found == [block(1), block(2)]
    slab.let_go(handle)
