import os

import pytest

from tetri.net import NetError
from tetri.net.lock import hold


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
