"""Paths on the command line. What a command writes is tried before its work: here, and for every option of every
program."""

import os
import re
import resource
import sys
from pathlib import Path

import click
import pytest

from tetri import paths
from tetri.paths import FILE, FOLDER, NEW_FOLDER, OUT_FILE, OUT_FOLDER, OUT_PLOT

PACKAGE = Path(paths.__file__).parent
PARAM = click.Option(["--out"])
NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def problem(kind, path):
    with pytest.raises(click.UsageError) as raised:
        kind.convert(str(path), PARAM, None)
    return raised.value.format_message()


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def place(tmp_path):
    """A folder with a file in it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.png").write_text("old")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((OUT_FILE, name) for name in ("file.png", "new", "folder/new")),
        *((OUT_PLOT, name) for name in ("file.png", "new.PNG")),
        *((OUT_FOLDER, name) for name in ("folder", "new", "new/er")),
        *((NEW_FOLDER, name) for name in ("new", "new/er")),
    ],
)
def test_what_can_be_written_stays_as_it_is(kind, name, place):
    before = content(place)
    assert kind.convert(str(place / name), PARAM, None) == place / name
    assert content(place) == before


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        (OUT_FILE, "/proc/x.png", "--out: /proc/x.png cannot be written: "),
        (OUT_FILE, "folder", "is a directory"),
        (OUT_FILE, "none/new", "--out: there is no folder "),
        (OUT_FILE, "file.png/new", "--out: there is no folder "),
        (OUT_FILE, "/dev/null", "--out: /dev/null cannot be written: not a regular file"),
        (OUT_FILE, "x" * 300, "cannot be written: File name too long"),
        (OUT_PLOT, "run.pdf", "--out draws a PNG: call it FILE.png, not "),
        (OUT_PLOT, "/proc/x.png", "--out: /proc/x.png cannot be written"),
        (OUT_FOLDER, "file.png", "is a file"),
        (OUT_FOLDER, "/proc/x", "--out: /proc/x cannot be written"),
        (OUT_FOLDER, "file.png/new", "cannot be written: Not a directory"),
        (NEW_FOLDER, "folder", "exists already"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(kind, name, says, place):
    before = content(place)
    message = problem(kind, place / name)
    assert says in message and "\n" not in message
    assert content(place) == before


@NOT_ROOT
def test_without_permission(place):
    (place / "file.png").chmod(0o400)
    assert "file.png cannot be written: Permission denied" in problem(OUT_FILE, place / "file.png")
    (place / "folder").chmod(0o500)
    assert "cannot be written: Permission denied" in problem(OUT_FILE, place / "folder" / "new")
    assert "cannot be written: Permission denied" in problem(OUT_FOLDER, place / "folder" / "new")


def test_a_path_after_an_equals_sign_may_begin_with_a_tilde(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    for kind in (FILE, FOLDER, OUT_FILE, OUT_FOLDER, NEW_FOLDER, OUT_PLOT):
        assert kind.convert("~/x.png", PARAM, None) == place / "x.png"


def test_a_full_disk(place):
    before, (soft, hard) = content(place), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        message = problem(OUT_FILE, place / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "new cannot be written: File too large" in message and content(place) == before


def test_a_link_stays_and_its_target_is_replaced(place):
    (place / "link").symlink_to("file.png")
    assert OUT_FILE.convert(str(place / "link"), PARAM, None) == place / "file.png"
    (place / "round").symlink_to("round")
    assert OUT_FILE.convert(str(place / "round"), PARAM, None) == place / "round"


def test_without_matplotlib_it_says_what_to_do(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'tetri[plot]'" in problem(OUT_PLOT, place / "new.png")


def test_every_option_that_names_an_output_is_tried_before_the_work():
    option = re.compile(r'\(\s*"--(?:out|plot|keep|predictions)",\s*(?:type=)?(\w+)')
    files = [*(PACKAGE / "cli").rglob("*.py"), *(PACKAGE / "bench").rglob("*.py")]
    found = [(path.name, kind) for path in files for kind in option.findall(path.read_text(encoding="utf-8"))]
    assert [each for each in found if not hasattr(paths, each[1]) and each[1] != "is_flag"] == []
    assert {"profile.py", "predictor_train.py", "sim.py", "predictor_chain.py"} <= {name for name, _ in found}
