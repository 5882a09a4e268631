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


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 99}, "version 99"),
        ({"kind": "classifier"}, "of kind"),
        ({"width": "wide"}, "'width' is no int"),
        ({"prior": [0.5, 0.1]}, "add up to 1"),
        ({"levels": [7.0]}, "numbers from 0 to 1"),
        ({"colour": 1}, "unknown 'colour'"),
        ({"prior": [0.5, 0.5]}, "5 buckets"),
        ({"head": None}, "has no 'head'"),
    ],
)
def test_a_card_that_is_wrong(tmp_path, change, word):
    path = made.hidden(tmp_path) / "hidden" / CARD
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    made.says(tmp_path, "hidden", word)
