"""Recorded texts: what a file of predictions says, and what is wrong with one."""

import json

import pytest

from tetri.request import LengthDistribution
from tetri.sim.texts import RecordedText, RecordedTextError, read

GOOD = {
    "prompt_tokens": 40,
    "tokens": 300,
    "source": "here",
    "width": 100,
    "classifier": [0.2, 0.3, 0.5],
    "hidden": [0.0, 0.25, 0.75],
    "later": {"128": [0.5, 0.5], "64": [0.1, 0.9]},
    "prompt": "kept by others",
}


def written(tmp_path, *rows):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_all_that_a_line_says(tmp_path):
    short = {"prompt_tokens": 1, "tokens": 1024, "width": 50, "later": None}
    first, second = read(written(tmp_path, GOOD, "", short))
    shares = {0: (0.0, 0.25, 0.75), 64: (0.1, 0.9), 128: (0.5, 0.5)}
    follows = tuple((known, LengthDistribution(100, each)) for known, each in shares.items())
    assert first == RecordedText(40, 300, 1024, "here", LengthDistribution(100, (0.2, 0.3, 0.5)), follows)
    assert first.reason == "stop"
    assert second == RecordedText(1, 1024) and second.reason == "length"
    assert read(written(tmp_path, short), 2048)[0].reason == "stop"


def test_shares_that_were_rounded_add_up_again(tmp_path):
    text = read(written(tmp_path, GOOD | {"classifier": [0.333, 0.333, 0.333]}))[0]
    assert text.classifier.shares == pytest.approx([1 / 3] * 3) and sum(text.classifier.shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "Expecting"),
        ("[1]", "not an object"),
        (GOOD | {"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
        (GOOD | {"tokens": 1025}, "1025 tokens, more than the limit of 1024"),
        (GOOD | {"prompt_tokens": "5"}, "prompt_tokens must be"),
        (GOOD | {"width": True}, "width must be"),
        (GOOD | {"classifier": [0.5, 0.4]}, "add up to 1, got 0.9"),
        (GOOD | {"classifier": [1.5, -0.5]}, "0 or more"),
        (GOOD | {"hidden": ["a"]}, "not a prediction of"),
        (GOOD | {"hidden": []}, "not a prediction of"),
        (GOOD | {"later": {"x": [1.0]}}, "not a prediction of"),
        (GOOD | {"later": {"300": [1.0]}}, "known tokens must be from 0 to 299, got 0 to 300"),
        (GOOD | {"later": [1.0]}, "not a prediction of"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, row, says):
    with pytest.raises(RecordedTextError) as error:
        read(written(tmp_path, GOOD, row))
    assert "jsonl:2: " in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_no_text_are_one_line(tmp_path):
    with pytest.raises(RecordedTextError, match="cannot be read: No such file"):
        read(tmp_path / "none")
    with pytest.raises(RecordedTextError, match="the file has no text: create it with"):
        read(written(tmp_path, ""))
