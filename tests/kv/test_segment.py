"""Mapping the segments of others: what is no segment harms no reader, and what is mapped is let go."""

import os
import struct
import time

import pytest

from tests.kv.mapped import BLOCK, SLOTS, put
from tests.kv.parties import block
from tetri.kv.base import KVForeign, KVLost
from tetri.kv.segment import VERSION
from tetri.kv.shm import ShmSlab
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


def handle_of(segment):
    return Handle(segment=segment, slots=[0], generations=[0], block_bytes=BLOCK)


def test_the_header_that_these_tests_forge_can_be_right(peer, tmp_path):
    (tmp_path / "tetri-test-p0-right").write_bytes(_header().ljust(RIGHT_SIZE, b"\0"))
    peer.meet("tetri-test-p0-right")
    assert peer.fetch(handle_of("tetri-test-p0-right"), None) == [bytes(BLOCK)]


@pytest.mark.parametrize("content", FALSE_SEGMENTS, ids=range(len(FALSE_SEGMENTS)))
def test_a_false_segment_is_lost_not_read(peer, tmp_path, content):
    (tmp_path / "tetri-test-p0-false").write_bytes(content)
    peer.meet("tetri-test-p0-false")
    with pytest.raises(KVLost):
        peer.fetch(handle_of("tetri-test-p0-false"), None)


def test_a_segment_that_is_no_plain_file_is_lost(peer, slab, tmp_path):
    (tmp_path / "tetri-test-link").symlink_to(tmp_path / slab.segment.name)
    (tmp_path / "tetri-test-folder").mkdir()
    os.mkfifo(tmp_path / "tetri-test-pipe")  # opening it must not wait for a writer
    for name, says in (("link", "cannot be opened"), ("folder", "not a file"), ("pipe", "not a file")):
        peer.meet(f"tetri-test-{name}")
        with pytest.raises(KVLost, match=says):
            peer.fetch(handle_of(f"tetri-test-{name}"), None)


FALSE_NAMES = ["", "x", "../x", "tetri-other-p0-1", *(f"tetri-test-{x}" for x in ("/x", "\0", "\ud800", "x" * 9999))]


@pytest.mark.parametrize("name", FALSE_NAMES, ids=range(len(FALSE_NAMES)))
def test_a_peer_that_says_it_has_a_segment_of_no_such_name_is_lost(peer, name):
    peer.meet(name)
    with pytest.raises(KVLost) as caught:
        peer.fetch(handle_of(name), None)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def mapped(name):
    """How this process has mapped that segment, its owner and its readers."""
    with open("/proc/self/maps") as maps:
        return sorted(line.split()[1] for line in maps if name in line)


def test_a_peer_is_mapped_once_read_only_and_until_parted_from(peer, slab):
    peer.meet(slab.segment.name)
    chunk = put(slab, block(1))
    for _ in range(2):
        peer.fetch(*chunk)
        assert mapped(slab.segment.name) == ["r--s", "rw-s"]
        peer.meet(slab.segment.name)
    peer.reader.part("p0")
    assert mapped(slab.segment.name) == ["rw-s"]


def test_a_restarted_peers_old_segment_is_let_go(peer, tmp_path):
    old = "none"
    for _ in range(3):
        slab = ShmSlab("test", "p1", SLOTS, BLOCK, directory=str(tmp_path))
        peer.meet(slab.segment.name, "p1")
        assert not mapped(old)
        peer.fetch(*put(slab, block(1)), peer="p1")
        old = slab.segment.name
        slab.close()
        assert mapped(old) == ["r--s"]
    with pytest.raises(KVForeign):
        peer.fetch(handle_of("tetri-test-p1-0123456789abcdef"), None, peer="p1")


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
