"""docs/configuration.md is what the tables say, and every setting is described there."""

import inspect

import pytest

from tetri.bench import configuration_page
from tetri.bench.configuration_page import MARKER, PAGE, SECTIONS, described, reference
from tetri.config import tables

SOURCE = '''
class One:
    """Of one thing."""

    a: int = 1  # behind
    # Above, on
    # two lines.
    b: str = f(
        "#",  # between
    )  # behind that
    c: bool = True

    # of nothing
    @property
    def d(self): ...
'''


def test_a_setting_has_the_comments_above_and_behind_it():
    assert described(SOURCE) == {"One": {"a": "Behind", "b": "Above, on two lines. behind that", "c": ""}}


def test_every_setting_is_described():
    found = described(inspect.getsource(tables))
    bare = [
        f"{name}.{key}" for name, kind in SECTIONS.items() for key, text in found[kind.__name__].items() if not text
    ]
    assert bare == []


def test_the_page_is_what_the_tables_say():
    by_hand, marker, written = PAGE.read_text(encoding="utf-8").partition(MARKER)
    assert by_hand.startswith("# Configuration\n") and marker
    assert written == reference(inspect.getsource(tables)), "run tools/make_configuration_page"


def test_rows_have_default_range_and_text():
    rows = reference(inspect.getsource(tables)).splitlines()
    line = "| `heartbeat_s` | `0.2` | a number, 0.01 to 60 | How often a worker reports what it holds |"
    assert rows[rows.index("## `[cluster]`") :].index(line)
    roles = "| `role` | required | `prefill`, `decode`, `mixed`, `auto` | The role in which it starts"
    assert any(row.startswith(roles) for row in rows)
    assert all(row.count("|") - row.count("\\|") == 5 for row in rows if row.startswith("|"))


def test_a_check_writes_nothing(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"by hand\n{MARKER}{reference(inspect.getsource(tables))}")
    page.chmod(0o400)
    monkeypatch.setattr(configuration_page, "PAGE", page)
    before = page.stat()
    with pytest.raises(SystemExit) as ended:
        configuration_page.main(["--check"], prog_name="make_configuration_page")
    assert not ended.value.code and page.stat().st_ino == before.st_ino


def test_an_old_page_is_told_and_renewed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"by hand\n{MARKER}old")
    monkeypatch.setattr(configuration_page, "PAGE", page)
    for arguments, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
        with pytest.raises(SystemExit) as ended:
            configuration_page.main(arguments, prog_name="make_configuration_page")
        assert ended.value.code == status
    assert "differs: run tools/make_configuration_page" in capsys.readouterr().err
    assert page.read_text() == f"by hand\n{MARKER}{reference(inspect.getsource(tables))}"
