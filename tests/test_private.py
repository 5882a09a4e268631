"""Folders that only their user may use: what another user may have put in their place is refused in one line."""

import os
import stat

import pytest

from tetri import private
from tetri.private import PrivateError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "mine" / "file").write_text("é", encoding="utf-8")
    return tmp_path / "mine"


def refusals(folder, *verbs):
    """What each says about a folder, in one line."""
    for verb in verbs or (private.make_folder, private.check_folder, lambda path: private.read_text(path / "file")):
        with pytest.raises(PrivateError, match=str(folder)) as caught:
            verb(folder)
        assert "\n" not in str(caught.value)
        yield str(caught.value)


def test_a_folder_is_made_and_closed_to_others(tmp_path):
    umask = os.umask(0)
    try:
        for path in (tmp_path / "a" / "new", tmp_path / "old"):
            if path.name == "old":
                path.mkdir(mode=0o775)
            private.make_folder(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            private.check_folder(path)
    finally:
        os.umask(umask)


def test_a_file_of_an_own_folder_is_read(folder):
    assert private.read_text(folder / "file") == "é"
    for missing in (folder / "none", folder.parent / "nowhere" / "file"):
        with pytest.raises(FileNotFoundError):
            private.read_text(missing)


def test_another_users_folder_is_refused_whatever_its_mode(folder, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    for mode in (0o777, 0o700, 0o000):
        folder.chmod(mode)
        for said in refusals(folder):
            assert f"belongs to another user (uid {owner})" in said and "cluster.run_dir" in said
        assert stat.S_IMODE(folder.stat().st_mode) == mode
    folder.chmod(0o700)


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o720, 0o755, 0o777])
def test_a_folder_that_others_may_enter_is_not_read_from(folder, mode):
    folder.chmod(mode)
    said = [*refusals(folder, private.check_folder, lambda path: private.read_text(path / "file"))]
    assert [text.endswith("chmod 700 it") for text in said] == [True, True]
    private.make_folder(folder)
    assert private.read_text(folder / "file") == "é"


def test_no_link_is_followed(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    for said in refusals(link):
        assert "is a link" in said
    (folder / "elsewhere").symlink_to(folder / "file")
    with pytest.raises(OSError, match="symbolic links"):
        private.read_text(folder / "elsewhere")


def test_what_is_no_plain_file_of_a_usual_size_is_refused_at_once(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(PrivateError, match="pipe: not a file of this user"):
        private.read_text(folder / "pipe")
    os.truncate(folder / "file", private.MOST_BYTES + 1)
    with pytest.raises(PrivateError, match="file: too large"):
        private.read_text(folder / "file")
    with pytest.raises(IsADirectoryError):
        private.read_text(folder / "..")


def test_a_folder_that_cannot_be_made_is_one_line(folder):
    below = folder / "file" / "below"
    assert [*refusals(below, private.make_folder)] == [f"{below}: cannot be the run directory: Not a directory"]


def test_a_file_in_the_place_of_the_folder_is_said_with_what_to_do(folder):
    for said in refusals(folder / "file"):
        assert said.endswith("is no folder: remove it, or set another cluster.run_dir")
