import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def run_folder():
    """A run directory with a short path: pytest's own may be too long for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="tetri-", dir="/tmp") as name:
        yield Path(name)
