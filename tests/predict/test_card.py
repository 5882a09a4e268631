"""A predictor's card, damaged or wrong."""

import json

import pytest

from tests.predict import made
from tetri.predict.card import CARD, HEAD


@pytest.mark.parametrize("file", [CARD, HEAD])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_cut_off(tmp_path, file, share):
    path = made.hidden(tmp_path) / "hidden" / file
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    made.says(tmp_path, "hidden", str(path), "train again")


WRONG = {"version 99": {"version": 99}, "of kind": {"kind": "classifier"}, "'width' is no int": {"width": "wide"}}
WRONG |= {
    "add up to 1": {"prior": [0.5, 0.1]},
    "numbers from 0 to 1": {"levels": [7.0]},
    "5 buckets": {"prior": [0.5, 0.5]},
}
WRONG |= {"unknown 'colour'": {"colour": 1}, "has no 'head'": {"head": None}}


def test_a_card_that_is_wrong(tmp_path):
    path = made.hidden(tmp_path) / "hidden" / CARD
    right = json.loads(path.read_text())
    for word, change in WRONG.items():
        fields = {name: value for name, value in (right | change).items() if value is not None}
        path.write_text(json.dumps(fields))
        made.says(tmp_path, "hidden", word)
