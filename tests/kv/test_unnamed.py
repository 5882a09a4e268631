"""Files that have lost their name while a process has them open."""

import os

import pytest

from tetri.kv.unnamed import reopen, unlinked, unnamed

NAME = "tetri-test-p0-0123456789abcdef"
NOBODY = 1 << 22  # above the largest process id


@pytest.fixture
def opened(tmp_path):
    """(descriptor, path) of a file with the bytes "kv"."""
    path = tmp_path / NAME
    path.write_bytes(b"kv")
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor, path
    os.close(descriptor)


def test_a_file_is_found_by_the_name_that_it_had_and_only_once_it_has_lost_it(opened):
    descriptor, path = opened
    assert not unlinked(descriptor) and str(path) not in unnamed(os.getpid()) and reopen(os.getpid(), NAME) is None
    path.unlink()
    assert unlinked(descriptor) and unnamed(os.getpid())[str(path)] == f"/proc/{os.getpid()}/fd/{descriptor}"
    assert reopen(os.getpid(), NAME[:-1]) is None
    again = reopen(os.getpid(), NAME)
    os.write(descriptor, b"KV")
    assert os.read(again, 9) == b"KV", "the same file, not a copy"
    with pytest.raises(OSError):
        os.write(again, b"x")
    os.close(again)


@pytest.mark.parametrize("pid", [NOBODY, 0, -1])
def test_a_process_that_is_not_there_has_none(opened, pid):
    opened[1].unlink()
    assert unnamed(pid) == {} and reopen(pid, NAME) is None


def test_a_descriptor_that_is_given_to_another_file_meanwhile_is_not_taken_for_it(opened, tmp_path, monkeypatch):
    descriptor, path = opened
    path.unlink()
    (tmp_path / "other").write_bytes(b"no KV")
    before, left = os.open, []

    def late(at, flags):
        other = before(tmp_path / "other", os.O_RDONLY)
        os.dup2(other, descriptor)
        os.close(other)
        left.append(before(at, flags))
        return left[0]

    monkeypatch.setattr(os, "open", late)
    assert reopen(os.getpid(), NAME) is None
    with pytest.raises(OSError):
        os.fstat(left[0])
