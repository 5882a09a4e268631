"""The command line in this process, and a fake broker in a run directory of its own."""

import io
import json
import sys
from contextlib import ExitStack

import pytest
from fake_broker import FakeBroker, answer

from tetri import cli


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty run directory, which the environment names."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    (tmp_path / "tetri").mkdir(mode=0o700)
    return tmp_path / "tetri"


@pytest.fixture
def broker(place):
    """Start a fake broker with a script, as what is up in the run directory."""
    with ExitStack() as started:

        def start(reply=answer):
            fake = started.enter_context(FakeBroker(reply))
            (place / "cluster.json").write_text(json.dumps({"clients": fake.address, "operators": fake.address}))
            return fake

        yield start


@pytest.fixture
def run(capfd, monkeypatch):
    """Run tetri-cli in this process: (exit status, stdout, stderr)."""

    def run_cli(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            cli.main([str(each) for each in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return run_cli
