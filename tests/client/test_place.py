import pytest
from fake_broker import FakeBroker, answer

import tetri
from tests.client.script import FAST
from tetri.client import TetriError, Unreachable


def test_the_address_comes_from_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    with pytest.raises(Unreachable, match="run tetri-cli up"):
        tetri.Client()
    (tmp_path / "tetri").mkdir()
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
