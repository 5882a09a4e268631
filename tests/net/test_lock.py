import os
import signal
import subprocess
import sys

import pytest

from tetri.net import NetError
from tetri.net.lock import hold

HOLDER = "import sys; from tetri.net.lock import hold; hold(sys.argv[1]); print('held', flush=True); input()"


def test_the_second_is_told_who_holds_it(tmp_path):
    path = tmp_path / "lock"
    with hold(path):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(NetError, match=f"lock: in use by process {os.getpid()}$"):
            hold(path)
    hold(path).release()


def test_release_twice_is_fine_and_the_file_stays_private(tmp_path):
    lock = hold(tmp_path / "lock")
    lock.release()
    lock.release()
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_the_lock_ends_with_its_process_however_that_dies(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(NetError, match=f"in use by process {child.pid}"):
            hold(path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    hold(path).release()


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(NetError, match="cannot open the lock file"):
        hold(tmp_path / "nowhere" / "lock")
