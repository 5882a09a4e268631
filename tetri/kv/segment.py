"""Segment files in /dev/shm. Creating a file reserves all of its memory; opening one validates it.

The format (docs/protocol.md, section 8): a header, a u64 generation and a mark for each slot, and at a multiple of
4096 the blocks; numbers in the machine's byte order. The owner holds flock(LOCK_EX) on the file while it runs, so an
unlocked file belongs to a dead owner. A file without a name need not be closed: others may have unlinked it
(unnamed.py). So the header says whether the owner has closed it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import struct
import time
from contextlib import suppress
from dataclasses import dataclass

from tetri.kv.base import KVError, KVLost
from tetri.kv.slab import FIRST_GENERATION, MARK, Segment
from tetri.kv.unnamed import UNLINKED, reopen, unlinked
from tetri.private import own_file

MAGIC = b"tetri-kv"
VERSION = 2
# magic, version, offset of slot 0, block bytes, slots, pid of the owner, bytes of the deployment's name, creation time;
# then the byte that is 1 once the owner has closed the segment
_CLOSED_AT = 48
_HEADER = struct.Struct("=8sIIQQIIQ16x")
_PAGE = 4096
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,80}")  # a deployment or an instance; keeps a file name under 255 bytes
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
_MEGABYTE = 1 << 20


@dataclass(slots=True)
class Mapping:
    """A segment and its memory mapping. The owner's also has the locked file's descriptor; a reader's has -1."""

    segment: Segment
    memory: mmap.mmap
    descriptor: int = -1

    def counters(self) -> dict[str, int]:
        """For the owner: as of `Slab`."""
        return {UNLINKED: 1} if self.descriptor >= 0 and unlinked(self.descriptor) else {}

    def unlink(self, path: str) -> None:
        """For the owner: mark the segment as closed and remove its file `path`, unless others have."""
        self.memory[_CLOSED_AT] = 1
        with suppress(FileNotFoundError):
            os.unlink(path)

    def close(self) -> None:
        """Unmap, and unlock the owner's file. A second call does nothing."""
        self.segment.release()
        with suppress(BufferError):  # a view of a block still exists: the last one to go unmaps the memory
            self.memory.close()
        if self.descriptor >= 0:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # explicit: the mapping may hold a duplicate descriptor
            os.close(self.descriptor)
            self.descriptor = -1


def create(directory: str, deployment: str, iid: str, slots: int, block_bytes: int) -> Mapping:
    """Create a locked segment with all pages populated. Raises KVError that says what is missing."""
    for label in (deployment, iid):
        if not _LABEL.fullmatch(label):
            raise KVError(f"{label[:80]!r} cannot be part of a segment's name: use letters, digits, '.', '_' and '-'")
    if slots < 1 or block_bytes < 1:
        raise KVError(f"a slab needs at least 1 slot of at least 1 byte, got {slots} slots of {block_bytes} bytes")
    name, descriptor = _locked_file(directory, f"tetri-{deployment}-{iid}-")
    try:
        size = size_of(slots, block_bytes)
        _reserve(descriptor, directory, size, f"{slots} slots of {block_bytes} bytes")
        # Populated: otherwise the first chunk would pay a page fault every 4 KB.
        memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except (KVError, OSError) as error:
        os.unlink(os.path.join(directory, name))
        os.close(descriptor)
        if isinstance(error, KVError):
            raise
        raise KVError(f"{directory}/{name}: cannot map {size} bytes ({error.strerror})") from None
    segment = _segment(name, memory, slots, block_bytes)
    for slot in range(slots):
        segment.generations[slot] = FIRST_GENERATION
    # The header comes last: readers refuse a file without magic, so they never see an unfinished one.
    facts = (_blocks_at(slots), block_bytes, slots, os.getpid(), len(deployment), time.monotonic_ns())
    _HEADER.pack_into(memory, 0, MAGIC, VERSION, *facts)
    return Mapping(segment, memory, descriptor)


def _locked_file(directory: str, prefix: str) -> tuple[str, int]:
    while True:
        name = prefix + secrets.token_hex(8)
        path = os.path.join(directory, name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KVError(f"{path}: cannot be made ({error.strerror})") from None
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink == 1:
            return name, descriptor
        os.close(descriptor)  # a sweep removed the file between open and flock, as it was unlocked


def _reserve(descriptor: int, directory: str, size: int, what: str) -> None:
    """Allocate the file's memory now: a later write to a page that cannot be allocated would raise SIGBUS."""
    free = free_bytes(directory)
    full = KVError(
        f"{directory} is too small for {what}: {megabytes(size)} needed, {megabytes(free)} free;"
        " lower transfer.slab_blocks, or enlarge it (docker run --shm-size)"
    )
    if size > free:  # checked first: a failing allocation would fill the file system for a moment
        raise full
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise full from None
        raise KVError(f"{directory}: cannot reserve {megabytes(size)} ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a segment file. `made`: creation time, CLOCK_MONOTONIC in nanoseconds."""

    block_bytes: int
    slots: int
    pid: int
    deployment_bytes: int
    made: int


def closed(descriptor: int) -> bool:
    """Whether the owner of an open segment has closed it."""
    return os.pread(descriptor, 1, _CLOSED_AT) != b"\0"


def attach(directory: str, deployment: str, name: str, owner: int) -> Mapping:
    """Map a peer's segment read-only, also one that has lost its name while the process `owner` runs. Raises KVLost
    when it does not exist or is not a segment of this deployment."""
    if not name.startswith(f"tetri-{deployment}-") or not _NAME.fullmatch(name):
        raise KVLost(f"{name[:80]!r} is no segment of this deployment")
    descriptor = opened(directory, name, owner)
    try:
        return read_only(descriptor, name)[1]
    finally:
        os.close(descriptor)


def opened(directory: str, name: str, owner: int) -> int:
    """As `look_at`, also for a file that has lost its name while the process `owner` runs."""
    try:
        return look_at(directory, name)
    except KVLost:
        descriptor = reopen(owner, name)
        if descriptor is None:
            raise
        return descriptor


def look_at(directory: str, name: str) -> int:
    """Open a file of this user read-only, without checking its content; returns the descriptor. Raises KVLost."""
    path = os.path.join(directory, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise KVLost(f"{path[:160]}: cannot be opened ({why})") from None
    if own_file(os.fstat(descriptor)):
        return descriptor
    os.close(descriptor)
    raise KVLost(f"{path[:160]}: not a file of this user")


def read_only(descriptor: int, name: str) -> tuple[Header, Mapping]:
    """Validate and map the segment in an open file. Raises KVLost when it cannot be mapped, or the file is no
    segment."""
    file_bytes = os.fstat(descriptor).st_size
    header, blocks_at = _header(os.pread(descriptor, _HEADER.size, 0), name)
    slots, size = header.slots, header.block_bytes
    if not slots or not size or blocks_at != _blocks_at(slots) or file_bytes != size_of(slots, size):
        raise KVLost(f"{name}: the header does not fit the file's {file_bytes} bytes")
    # Not populated: for a large slab that would block serving for tens of milliseconds. Read faults map 16 pages each
    # and are spread over the chunks.
    try:
        memory = mmap.mmap(descriptor, file_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:  # this process has no descriptors or address space left
        raise KVLost(f"{name}: cannot be mapped ({error.strerror})") from None
    return header, Mapping(_segment(name, memory, slots, size), memory)


def _header(start: bytes, name: str) -> tuple[Header, int]:
    """The header, and the offset of slot 0. Raises KVLost."""
    if len(start) < _HEADER.size:
        raise KVLost(f"{name}: {len(start)} bytes are too few for a segment")
    magic, version, blocks_at, size, slots, pid, deployment_bytes, made = _HEADER.unpack(start)
    if magic != MAGIC or version != VERSION:
        raise KVLost(f"{name}: not a segment of version {VERSION}")
    return Header(size, slots, pid, deployment_bytes, made), blocks_at


def sweep(deployment: str, iid: str | None = None, directory: str = "/dev/shm") -> list[str]:
    """Remove the segments of a deployment (or of one instance) whose owner is dead. Returns their names."""
    owner = r"[A-Za-z0-9._-]+" if iid is None else re.escape(iid)
    pattern = re.compile(rf"tetri-{re.escape(deployment)}-{owner}-[0-9a-f]{{16}}")
    return [name for name in sorted(os.listdir(directory)) if pattern.fullmatch(name) and remove_dead(directory, name)]


def remove_dead(directory: str, name: str) -> bool:
    """Remove a segment whose owner is dead. False: the owner lives, or the file is gone or another user's."""
    path = os.path.join(directory, name)
    try:
        descriptor = look_at(directory, name)
    except KVLost:
        return False  # removed by another sweep, or another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)  # under the lock: see _locked_file
    except (BlockingIOError, FileNotFoundError):
        return False  # the owner lives, or another sweep removed it
    finally:
        os.close(descriptor)
    return True


def free_bytes(directory: str) -> int:
    """Bytes that files can still take in a directory. Raises OSError."""
    filesystem = os.statvfs(directory)
    return filesystem.f_bavail * filesystem.f_frsize


def size_of(slots: int, block_bytes: int) -> int:
    """Bytes of a segment file."""
    return _blocks_at(slots) + slots * block_bytes


def _blocks_at(slots: int) -> int:
    return -(-(_HEADER.size + (8 + MARK.size) * slots) // _PAGE) * _PAGE


def _segment(name: str, memory: mmap.mmap, slots: int, block_bytes: int) -> Segment:
    whole = memoryview(memory)
    marks, start = _HEADER.size + 8 * slots, _blocks_at(slots)
    return Segment(
        name=name,
        slots=slots,
        block_bytes=block_bytes,
        generations=whole[_HEADER.size : marks].cast("Q"),
        blocks=whole[start : start + slots * block_bytes],
        marks=whole[marks : marks + MARK.size * slots],
    )


def megabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / _MEGABYTE:,.0f} MB"
