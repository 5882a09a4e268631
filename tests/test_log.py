import logging
import re

import pytest

from tetri import log


@pytest.fixture(autouse=True)
def _restore():
    logger = logging.getLogger("tetri")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_one_line_with_time_level_process_and_message(capsys, monkeypatch):
    monkeypatch.delenv("TETRI_LOG", raising=False)
    log.start("worker-p0")
    logging.getLogger("tetri.proc").warning("lost a peer %s", log.fields(iid="d0", rid=None))
    logging.getLogger("tetri.proc").debug("unseen")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12} WARNING worker-p0 lost a peer iid=d0\n", err)


def test_a_traceback_stays_on_its_line(capsys):
    log.start("b")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("tetri").exception("went wrong")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "first | second" in err


def test_starting_twice_does_not_double_the_lines(capsys):
    log.start("b")
    log.start("b").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_the_level_comes_from_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TETRI_LOG", "Debug")
    log.start("b").debug("seen")
    assert "seen" in capsys.readouterr().err
    monkeypatch.setenv("TETRI_LOG", "loud")
    with pytest.raises(log.LogError, match="debug, info, warning, error, got 'loud'"):
        log.start("b")


def test_fields():
    assert log.fields(rid="r1", iid=None, n=0) == "rid=r1 n=0"
