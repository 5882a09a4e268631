"""What all benchmarks report with."""

import json

import click
import pytest

from tetri.bench.report import BenchError, Program, give, interval, markdown, one_line, records, spread, table


def test_a_spread_has_the_median_the_99th_percentile_and_the_worst():
    found = spread((0.001 * value for value in range(101)), 1000, 6)
    assert found == {"median": 50, "p99": 99, "worst": 100}
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert (found["mean"], found["high"] - 2.0) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert found["low"] == pytest.approx(4.0 - found["high"])


def test_names_are_to_the_left_and_numbers_to_the_right():
    shown = table(("", "ms", "of it"), [("short", "1.5", "+3 %"), ("the longest", "-12.25", "")])
    assert shown.splitlines() == ["                 ms  of it", "short           1.5   +3 %", "the longest  -12.25"]


def test_objects_with_other_keys_are_one_table():
    assert records([{"a": 1}, {"a": 2, "b": "x"}]).splitlines() == ["a  b", "1", "2  x"]


def test_markdown_has_a_line_below_its_head():
    assert markdown(["", "x"], [["a", "1"]]) == "|  | x |\n|---|---|\n| a | 1 |"


def test_a_result_is_one_object_or_text(capsys):
    give({"ratio": 0.98}, "0.98", True)
    assert json.loads(capsys.readouterr().out) == {"ratio": 0.98}
    give({"ratio": 0.98}, "0.98", False)
    assert capsys.readouterr().out == "0.98\n"


def test_an_error_that_was_expected_is_one_line_and_an_exit_status(capsys):
    for error in (BenchError("too short"), LookupError("too short")):
        with pytest.raises(SystemExit) as ended, one_line("bench", LookupError, status=3):
            raise error
        assert ended.value.code == 3 and capsys.readouterr().err == "bench: too short\n"
    with pytest.raises(KeyboardInterrupt), one_line("bench", LookupError):
        raise KeyboardInterrupt


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(("ends", "status"), [(None, 0), (SystemExit(3), 3), (FULL, 1)])
def test_a_program_ends_with_a_status_and_one_line(ends, status, capsys):
    @click.command(cls=Program)
    def command():
        if ends is not None:
            raise ends

    with pytest.raises(SystemExit) as ended:
        command.main([], prog_name="bench")
    assert ended.value.code == status
    assert capsys.readouterr().err == ("bench: No space left on device\n" if status == 1 else "")
