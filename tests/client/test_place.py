import errno
import os

import pytest
from fake_broker import FakeBroker, answer

import tetri
from tests.client.script import FAST
from tetri.client import AsyncClient, Client, Operator, TetriError, Unreachable
from tetri.client.place import address_in


def test_the_address_comes_from_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    with pytest.raises(Unreachable, match="run tetri-cli up"):
        tetri.Client()
    (tmp_path / "tetri").mkdir(mode=0o700)
    (tmp_path / "tetri" / "cluster.json").write_text("{}")
    with pytest.raises(TetriError, match="cannot be used"):
        tetri.Client()
    with FakeBroker(answer) as broker:
        (tmp_path / "tetri" / "cluster.json").write_text(f'{{"clients": "{broker.address}"}}')
        with tetri.Client(**FAST) as client:
            assert client.generate("hi").text == "one two three"
    monkeypatch.setenv("TETRI_CONF", str(tmp_path / "none.toml"))
    with pytest.raises(TetriError, match=r"none\.toml: cannot be read"):
        tetri.Client()


def test_a_process_without_free_descriptors_is_not_told_to_restart_the_deployment(tmp_path, monkeypatch):
    def opened(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files", "cluster.json")

    monkeypatch.setattr("tetri.private.read_text", opened)
    with pytest.raises(TetriError, match=r"cluster\.json: cannot be read: Too many open files$"):
        address_in(tmp_path)


@pytest.mark.parametrize("kind", [Client, AsyncClient, Operator])
@pytest.mark.parametrize("fault", ["belongs to another user", "is a link", "chmod 700"])
def test_nobody_is_led_to_the_broker_of_another_user(tmp_path, monkeypatch, kind, fault):
    """Whoever wrote cluster.json gets the prompts."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    folder = tmp_path / "tetri"
    folder.mkdir(mode=0o700)
    (folder / "cluster.json").write_text('{"clients": "ipc:///tmp/theirs", "operators": "ipc:///tmp/theirs"}')
    if "link" in fault:
        folder.rename(tmp_path / "theirs")
        folder.symlink_to(tmp_path / "theirs")
    elif "chmod" in fault:
        folder.chmod(0o777)
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(TetriError, match=fault) as caught:
        kind()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
