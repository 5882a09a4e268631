"""What is written whole or not at all."""

import errno

import pytest

from tetri import atomic

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_one_that_is_there(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first\n", "zweite ü\n"):
        atomic.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert names(tmp_path) == ["a.txt"]


def write_file(path, text):
    path.write_text(text)


def write_folder(path, text):
    path.mkdir(exist_ok=True)
    (path / "in it").write_text(text)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_text() for path in folder.rglob("*")}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("ready", "write"), [(atomic.file, write_file), (atomic.folder, write_folder)])
def test_what_does_not_get_ready_changes_nothing(tmp_path, error, there, ready, write):
    path = tmp_path / "made"
    if there:
        write(path, "old")
    before = content(tmp_path)
    with pytest.raises(type(error)) as raised, ready(path) as part:
        write(part, "half of the ne")
        assert before.items() <= content(tmp_path).items()
        raise error
    assert raised.value is error and content(tmp_path) == before


def test_a_file_in_no_folder_is_an_error_of_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory") as raised:
        atomic.write_text(tmp_path / "none" / "a.txt", "text")
    assert "\n" not in str(raised.value)


def test_a_file_where_a_folder_is_leaves_the_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        atomic.write_text(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["b"]


def test_a_folder_replaces_the_one_that_is_there(tmp_path):
    path = tmp_path / "new" / "made"
    for name in ("first", "second"):
        with atomic.folder(path) as part:
            assert part.name == "made" and names(part) == []
            (part / name).write_text(name)
        assert names(path) == [name]
    assert names(path.parent) == ["made"]


def test_what_a_killed_process_left_of_a_folder_goes(tmp_path):
    killed = atomic.folder(tmp_path / "made")
    (killed.__enter__() / "half").touch()
    with atomic.folder(tmp_path / "made") as part:
        assert names(part) == []
        (part / "whole").touch()
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["whole"]


def test_a_folder_that_fails_takes_the_folders_that_were_made_for_it_along(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="No space"), atomic.folder(tmp_path / "there" / "new" / "er" / "made"):
        raise FULL
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []


def test_the_error_of_a_file_names_it(tmp_path):
    with pytest.raises(OSError, match="No space") as raised, atomic.file(tmp_path / "made"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "made")
    with pytest.raises(OSError, match="No such file") as raised:
        atomic.write_text(tmp_path / "none" / "made", "text")
    assert raised.value.filename == str(tmp_path / "none" / "made")


def test_a_check_leaves_nothing_and_no_file_changes(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        atomic.check(tmp_path / name)
    assert content(tmp_path) == {"old": "old"}
    with pytest.raises(OSError, match="not a regular file"):
        atomic.check(tmp_path)
