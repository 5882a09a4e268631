"""The split, and what is made of lengths and states."""

import json

import numpy as np
import pytest

from tests.predict import made
from tetri.predict import examples
from tetri.predict.lengths import Length, PredictError


def test_the_split_goes_by_prompt_and_seed_and_equal_folds_by_prompt():
    lengths = [Length(f"prompt {number}", 5) for number in range(4000)]
    held = [length for length in lengths if examples.is_held_out(length, 0)]
    assert len(held) / 4000 == pytest.approx(0.15, abs=0.02)
    assert {examples.is_held_out(Length(length.prompt, 9, sample=3), 0) for length in held} == {True}
    other = [length for length in lengths if examples.is_held_out(length, 1)]
    assert 0.05 < len(set(other) & set(held)) / len(held) < 0.3  # as by chance
    lengths = [Length(f"prompt {number // 2}", 5, sample=number % 2) for number in range(80)]
    folds = examples.folds_of(lengths, 0)
    assert np.bincount(folds).tolist() == [20] * examples.FOLDS
    assert (folds[::2] == folds[1::2]).all()
    assert examples.weights_of(lengths[:3]) == pytest.approx([0.5, 0.5, 1.0])


def test_rows_of_states(tmp_path):
    file = made.lengths(tmp_path / "a.jsonl", count=3, layers=(1, 2))
    texts = examples.read_texts([file], states=True)
    rows = examples.state_rows(texts, texts.lengths, 2, 0)
    (length, *_) = texts.lengths
    kept = texts.states[length.key]
    mine = [at for at, known in enumerate(kept.outputs) if known < length.tokens]
    assert rows.features[: len(mine)] == pytest.approx(kept.rows[mine, 1].astype("f4"))
    assert rows.tokens[: len(mine)].tolist() == [length.tokens - kept.outputs[at] for at in mine]
    assert rows.known[0] == 0 and set(rows.weight.tolist()) == {1.0}
    assert rows.chosen(rows.known > 0).known.tolist() == [known for known in rows.known.tolist() if known]
    with pytest.raises(PredictError, match="layer 3 was not kept .* but 1, 2"):
        examples.state_rows(texts, texts.lengths, 3, 0)


def test_files_of_different_kinds_are_not_mixed_and_of_several_texts_the_first_is_judged(tmp_path):
    one, two = made.lengths(tmp_path / "a.jsonl", 3), made.lengths(tmp_path / "b.jsonl", 3)
    plan = tmp_path / "b.jsonl.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"temperature": 0.1}))
    with pytest.raises(PredictError, match="another way"):
        examples.read_texts([one, two], states=False)
    file = made.lengths(tmp_path / "a.jsonl", count=5, samples=3)
    texts = examples.read_texts([file], states=False)
    assert len(texts.lengths) == 15 and [length.sample for length in texts.first()] == [0] * 5


def test_what_is_missing_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("not json\n")
    for name, says in (("none", "No such file"), ("empty", "no lengths")):
        with pytest.raises(PredictError, match=says):
            examples.read_texts([tmp_path / f"{name}.jsonl"], states=False)
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a", "tokens": 3}\nnot json\n{"prompt": "b", "tokens": 0}\n')
    texts = examples.read_texts([tmp_path / "bare.jsonl"], states=False)
    assert [length.tokens for length in texts.lengths] == [3] and texts.limit == 3
    assert len(texts.bad) == 2 and ":2:" in texts.bad[0]
    with pytest.raises(PredictError, match="collect with --layers"):
        examples.read_texts([tmp_path / "bare.jsonl"], states=True)
