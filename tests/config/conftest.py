from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    def write_config(text: str) -> Path:
        path = tmp_path / "t.toml"
        path.write_text(text)
        return path

    return write_config
