import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
import zmq

from tetri.net import keys


@pytest.fixture
def run_folder():
    """A run directory with a short path: pytest's own may be too long for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="tetri-", dir="/tmp") as name:
        yield Path(name)


class Kept(zmq.Context):
    """Keeps its sockets until it is destroyed, so that a test need not close them."""

    kept: ClassVar[list] = []

    def socket(self, kind):
        self.kept.append(super().socket(kind))
        return self.kept[-1]


@pytest.fixture
def context():
    made = Kept()
    yield made
    made.destroy(linger=0)
    made.kept.clear()


@pytest.fixture
def key(tmp_path):
    keys.generate(str(tmp_path / "key"))
    return keys.load(str(tmp_path / "key"))


@pytest.fixture
def other_key(tmp_path):
    keys.generate(str(tmp_path / "other"))
    return keys.load(str(tmp_path / "other"))
