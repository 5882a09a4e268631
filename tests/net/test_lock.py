import os
import signal
import subprocess
import sys

import pytest

from tetri.net import NetError
from tetri.net.lock import hold

HOLDER = "import sys; from tetri.net.lock import hold; hold(sys.argv[1]); print('held', flush=True); input()"


def test_the_second_learns_who_holds_it_release_may_come_twice_and_no_folder_is_one_line(tmp_path):
    path = tmp_path / "lock"
    with hold(path):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(NetError, match=f"lock: in use by process {os.getpid()}$"):
            hold(path)
    lock = hold(path)
    lock.release()
    lock.release()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(NetError, match="cannot open the lock file"):
        hold(tmp_path / "nowhere" / "lock")


def test_the_lock_ends_with_its_process_however_that_dies(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(NetError, match=f"in use by process {child.pid}"):
            hold(path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    hold(path).release()
