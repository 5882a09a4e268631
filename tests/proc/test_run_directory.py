"""What is made again in a run directory, by whom, and what locks it."""

import fcntl
import logging
import os
import stat
from threading import Thread

import pytest
from live import wait_until

from tetri.private import PrivateError
from tetri.proc import run_directory
from tetri.proc.supervise import Supervisor

LOG = logging.getLogger("kept")


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "CHECK_S", 0.02)
    return tmp_path / "run"


@pytest.fixture
def started(run_dir, monkeypatch):
    """As if supervisord had started this process."""
    monkeypatch.setenv("SUPERVISOR_SERVER_URL", f"unix://{Supervisor(run_dir).socket}")


def remove(run_dir):
    run_dir.rename(run_dir.with_name(f"removed-{os.urandom(4).hex()}"))


def free(run_dir):
    """Whether a cleaner could lock the directory."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_the_directory_is_locked_against_cleaners_also_after_it_was_removed(run_dir):
    with run_directory.kept(run_dir, LOG), run_directory.kept(run_dir, LOG):
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        assert not free(run_dir)
        for _ in range(2):
            remove(run_dir)
            wait_until(lambda: run_dir.is_dir() and not free(run_dir), "it is not locked")
    assert free(run_dir)


def test_removed_files_are_written_again_with_their_mode(run_dir, started):
    run_dir.mkdir()
    with run_directory.kept(run_dir, LOG):
        paths = [run_dir / name for name in run_directory.KEPT]
        for path in paths:
            path.write_text(f"text of {path.name}")
            path.chmod(0o600)
        keeper = run_directory.Keeper(run_dir, LOG)  # another process, which has seen them for certain
        keeper.look()
        remove(run_dir)
        keeper.look()
        for path in paths:
            assert path.read_text() == f"text of {path.name}" and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert {path.name for path in run_dir.iterdir() if path.name[0] != "."} == {*run_directory.KEPT}
        keeper.close()


def test_a_program_that_was_started_by_hand_writes_no_file(run_dir):
    run_dir.mkdir()
    (run_dir / "cluster.json").write_text("{}")
    keeper = run_directory.Keeper(run_dir, LOG)
    keeper.look()
    remove(run_dir)
    keeper.look()
    assert list(run_dir.iterdir()) == []
    keeper.close()


def test_what_cannot_be_made_is_logged_once_and_made_later(run_dir, started, caplog):
    parent = run_dir.parent / "parent"
    keeper = run_directory.Keeper(parent / "run", LOG)
    keeper.look()
    assert caplog.text == ""
    parent.rename(run_dir)
    parent.write_text("")
    for _ in range(3):
        keeper.look()
    assert len(caplog.records) == 1 and "cannot be the run directory: Not a directory" in caplog.text
    parent.unlink()
    keeper.look()
    assert not free(parent / "run")
    keeper.close()


def test_a_program_uses_a_directory_of_its_own_user_only(run_dir, monkeypatch):
    run_dir.mkdir(mode=0o755)
    with run_directory.kept(run_dir, LOG):
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    link = run_dir.with_name("link")
    link.symlink_to(run_dir)
    with pytest.raises(PrivateError, match="link: is a link"), run_directory.kept(link, LOG):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: run_dir.stat().st_uid + 1)
    with pytest.raises(PrivateError, match="run: belongs to another user"), run_directory.kept(run_dir, LOG):
        pass


def test_what_is_no_plain_file_halts_nothing_and_is_replaced_once_it_is_gone(run_dir, started, caplog):
    run_dir.mkdir(mode=0o700)
    state = run_dir / run_directory.STATE
    state.write_text("mine")
    keeper = run_directory.Keeper(run_dir, LOG)
    keeper.look()
    state.unlink()
    os.mkfifo(state)
    looking = Thread(target=keeper.look, daemon=True)  # it would wait for a writer for ever
    looking.start()
    looking.join(20)
    assert not looking.is_alive() and "cluster.json: not a file of this user: remove it" in caplog.text
    state.unlink()
    keeper.look()
    assert state.read_text() == "mine"
    keeper.close()
