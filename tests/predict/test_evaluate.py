"""How predictions are judged."""

import json

import numpy as np
import pytest

from tests.predict import made
from tetri.predict import evaluate
from tetri.predict.examples import is_held_out
from tetri.predict.model import load


def test_baselines_know_nothing_of_what_they_are_judged_on(hidden):
    """A regression learnt from other texts cannot know of a shift in the judged ones."""
    out, _, texts = hidden
    loaded = {"hidden": load(out, "hidden")}
    held = [length for length in texts.first() if is_held_out(length, 0)]
    others = [length for length in texts.first() if not is_held_out(length, 0)]
    judged = evaluate.judge(loaded, texts, held, made.quiet)
    found = evaluate.report(judged, others, loaded)
    tokens = np.array([length.tokens for length in held])
    median = np.median([length.tokens for length in others])
    assert found["majority"]["mae"] == pytest.approx(np.abs(tokens - median).mean(), abs=0.06)
    assert found["by_source"]["100"] > found["majority"]["100"]  # stories are long
    alone = evaluate.report(judged, [], loaded)  # in five parts
    assert alone["by_source"]["100"] > alone["majority"]["100"] and alone["n"] == found["n"]


def test_predictions_for_the_simulator(hidden):
    out, _, texts = hidden
    held = [length for length in texts.first() if is_held_out(length, 0)]
    judged = evaluate.judge({"hidden": load(out, "hidden")}, texts, held, made.quiet)
    rows = evaluate.predictions(judged)
    assert [row["tokens"] for row in rows] == [length.tokens for length in held]
    for row in rows:
        assert row["prompt_tokens"] == 9 and row["width"] == 50 and "both" not in row
        assert sum(row["hidden"]) == pytest.approx(1.0, abs=1e-3)
        assert [int(known) for known in row.get("later", {})] == list(range(32, row["tokens"], 32))
    assert json.loads(json.dumps(rows)) == rows


def test_what_is_beyond_the_limit_counts_as_the_limit():
    distribution = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert evaluate.capped(distribution, 50, 60) == pytest.approx(np.array([[0.1, 0.9]]))
    assert evaluate.capped(distribution, 50, 1000) == pytest.approx(distribution)
    one, other = np.array([[0.5, 0.5, 0.0]]), np.array([[0.8, 0.1, 0.1]])
    both = evaluate.together(one, other)
    assert both.sum() == pytest.approx(1.0) and both.argmax() == 0 and both[0, 2] < 0.001
