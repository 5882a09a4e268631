"""The lines of log files, copied as they are written: rotation, lines without an end, a reader that is slow or gone."""

import os
from contextlib import closing

import live
import pytest

from tetri.proc.follow import LEFT_OUT, PIECE, Follower, LogFile


@pytest.fixture
def log(tmp_path):
    with closing(LogFile(tmp_path / "p0.log")) as found:
        yield found


def append(log, text):
    with open(log.path, "ab") as file:
        file.write(text)


def rotate(log):
    """As supervisord does, with one old file."""
    os.replace(log.path, f"{log.path}.1")
    append(log, b"")


def lines(log):
    return [line for some in log.lines() for line in some]


def test_lines_come_when_they_are_whole(log):
    assert lines(log) == []  # not yet made
    append(log, b"one\n\ntw")
    assert lines(log) == [b"one", b""]
    append(log, b"o\nthree")
    assert lines(log) == [b"two"]
    assert log.end() == [b"three"] and log.end() == []


def test_a_line_without_an_end_does_not_fill_the_memory(log):
    append(log, b"x" * (3 * PIECE) + b"\n")
    found = lines(log)
    assert b"".join(found) == b"x" * (3 * PIECE) and max(map(len, found)) <= 2 * PIECE


def test_rotation_loses_no_line_and_splits_none(log):
    append(log, b"one\ntw")
    assert lines(log) == [b"one"]
    append(log, b"o\nthr")
    rotate(log)
    append(log, b"ee\n")
    assert lines(log) == [b"two", b"three"]
    append(log, b"four\n")
    assert lines(log) == [b"four"]


def test_lines_that_were_rotated_away_unseen_are_marked(log):
    append(log, b"one\n")
    assert lines(log) == [b"one"]
    for text in (b"two\n", b"three\n", b"four\n"):
        rotate(log)
        append(log, text)
    assert lines(log) == [LEFT_OUT, b"four"]


def test_a_log_that_exists_is_read_from_a_given_byte_on(tmp_path):
    (tmp_path / "p0.log").write_bytes(b"old\nnew\n")
    with closing(LogFile(tmp_path / "p0.log", 4)) as log:
        assert lines(log) == [b"new"]
        rotate(log)
        append(log, b"newer\n")
        assert lines(log) == [b"newer"]


def test_a_file_that_others_remove_is_read_on(log):
    append(log, b"one\n")
    with open(log.path, "ab") as writer:
        assert lines(log) == [b"one"]
        log.path.unlink()
        writer.write(b"two\n")
        writer.flush()
        assert lines(log) == [b"two"]
    append(log, b"three\n")  # made again
    assert lines(log) == [b"three"]


def read_all(descriptor):
    with open(descriptor, "rb") as file:
        return file.read().splitlines()


def test_each_line_has_the_name_of_its_program(tmp_path):
    problems, (reader, writer) = [], os.pipe()
    (tmp_path / "b").write_bytes(b"1\n2\n")
    follower = Follower({"broker": LogFile(tmp_path / "b"), "p0": LogFile(tmp_path / "p")}, writer, problems.append)
    (tmp_path / "p").write_bytes(b"3\nlast")
    follower.close(live.PATIENCE_S)
    os.close(writer)
    assert read_all(reader) == [b"broker | 1", b"broker | 2", b"p0     | 3", b"p0     | last"] and problems == []


def test_a_reader_that_is_gone_is_reported_once(tmp_path):
    problems, (reader, writer) = [], os.pipe()
    os.close(reader)
    (tmp_path / "b").write_bytes(b"1\n2\n")
    follower = Follower({"broker": LogFile(tmp_path / "b"), "p0": LogFile(tmp_path / "b")}, writer, problems.append)
    live.wait_until(lambda: problems != [], "not reported")
    follower.close(live.PATIENCE_S)
    os.close(writer)
    assert problems == ["the logs are no longer copied to standard output (Broken pipe)"]


def test_a_reader_that_does_not_read_holds_nobody_up(tmp_path):
    problems, (reader, writer) = [], os.pipe()
    (tmp_path / "b").write_bytes(b"x\n" * (1 << 20))
    follower = Follower({"broker": LogFile(tmp_path / "b")}, writer, problems.append)
    follower.close(0.3)
    assert problems == ["the last lines of the logs were not copied: their reader is too slow"]
    os.close(reader)  # ends the thread
    live.wait_until(lambda: len(problems) == 2, "still writing")
    os.close(writer)
