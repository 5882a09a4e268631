"""Which memory is moved to huge pages, and that its bytes stay."""

import mmap

from tetri.engine.vllm.huge_pages import collapse, in_use


def mapping(addresses, size_kib, resident_kib, flags="rw-p", name=""):
    head = f"{addresses} {flags} 00000000 00:00 0 {name}".rstrip() + (" " if not name else "")
    return f"{head}\nSize:  {size_kib} kB\nKernelPageSize:  4 kB\nRss:  {resident_kib} kB\nPss:  1 kB\n"


def test_large_memory_in_use_is_moved_and_kv_without_requests_is_not():
    smaps = "".join(
        [
            mapping("7f0000000000-7f0000800000", 8192, 8192),
            mapping("7f1000000000-7f1000800000", 8192, 100),  # not in use
            mapping("7f2000000000-7f2000001000", 4, 4),  # small
            mapping("7f3000000000-7f3000800000", 8192, 8192, "r--p"),
            mapping("550000000000-550000800000", 8192, 7000, name="[heap]"),
            mapping("7f4000000000-7f4000800000", 8192, 8192, name="/usr/lib/some.so"),
        ]
    )
    assert [*in_use(smaps)] == [(0x7F0000000000, 0x7F0000800000), (0x550000000000, 0x550000800000)]


def test_the_bytes_stay():
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(range(256)) * (len(memory) // 256)
        assert collapse() >= 0  # 0 on an old kernel
        assert memory[:] == bytes(range(256)) * (len(memory) // 256)
