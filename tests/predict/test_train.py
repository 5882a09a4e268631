"""From lengths to a folder that predicts, for both kinds, and how it is judged."""

from unittest.mock import Mock

import numpy as np
import pytest

from tests.predict import made
from tetri.predict.card import CARD, HEAD, LATER, read_card
from tetri.predict.examples import is_held_out, read_texts
from tetri.predict.lengths import PredictError
from tetri.predict.model import load
from tetri.predict.train import TrainSettings, train

pytestmark = pytest.mark.usefixtures("little_to_learn")


def test_hidden(hidden):
    out, found, texts = hidden
    held = [length for length in texts.first() if is_held_out(length, 0)]
    assert found["n"] == len(held) and found["kind"] == "hidden"
    assert found["acc"]["100"] > found["majority"]["100"] + 0.2
    assert found["mae"] < found["by_length"]["mae"] and found["tau"] > found["by_length"]["tau"]
    card = read_card(out, "hidden")
    assert card.layer == 2  # the other layer is noise
    assert (card.every, card.weights, card.scores["acc"]) == (32, "weights-of-tiny", found["acc"])
    assert card.ceiling["prompts"] == made.COUNT and card.data["sources"] == {"sums": 60, "stories": 60}
    assert card.split["prompts_learnt"] == made.COUNT - len(held)
    left_out = card.scores["left_out"]
    assert left_out["n"] == made.COUNT - len(held) and left_out["acc"]["100"] > left_out["by_source"]["100"] - 0.2
    assert sum(card.prior) == pytest.approx(1.0, abs=1e-3) and list(card.levels) == sorted(card.levels)
    assert any("OPT-13B" in note for note in card.notes)
    assert sorted(path.name for path in (out / "hidden").iterdir()) == [CARD, HEAD, LATER]
    assert "story" not in (out / "hidden" / CARD).read_text()  # no prompt is copied
    head = load(out, "hidden").head
    assert {head.has_seen(length.key[0]) == (not is_held_out(length, 0)) for length in texts.lengths} == {True}


def test_what_remains_is_estimated_while_it_is_written(hidden):
    out, found, _ = hidden
    assert found["later"]["32"]["mae"] < 0.7 * found["later"]["32"]["mae_of_the_median"]
    loaded = load(out, "hidden", "weights-of-tiny")
    state = np.zeros((2, 6), "f4")
    state[:, 0], state[:, 1] = 1, (2.0, 0.3)  # as made.lengths writes what is left
    more, less = (np.dot(one.shares, np.arange(len(one.shares))) for one in loaded.estimate(state, [32, 160]))
    assert more > less + 1
    (out / "hidden" / LATER).rename(out / "hidden" / "away")
    with pytest.raises(PredictError, match="later.safetensors: No such file"):
        load(out, "hidden")
    (out / "hidden" / "away").rename(out / "hidden" / LATER)


def test_a_classifier_with_an_encoder_of_ones_own(lengths_file, tmp_path):
    encoder = made.encoder(tmp_path / "bert")
    texts = read_texts([lengths_file], states=False)
    wanted = TrainSettings("classifier", tmp_path / "out", "tiny", "weights-of-tiny", encoder=str(encoder), cut=32)
    (tmp_path / "out").mkdir()
    found = train(texts, wanted, made.quiet)
    assert found["acc"]["100"] > found["majority"]["100"] + 0.2
    card = read_card(tmp_path / "out", "classifier")
    assert (card.cut, card.depth, card.encoder) == (32, 1, str(encoder))
    distribution = load(tmp_path / "out", "classifier").classify(["tell a long story about 7", "what is 8 and 8?"])
    likeliest = [int(np.argmax(one.shares)) for one in distribution]
    assert likeliest[0] >= 3 and likeliest[1] <= 1


def test_a_failure_leaves_the_predictor_that_was_there_and_too_few_prompts_make_none(hidden, tmp_path, monkeypatch):
    out, _, texts = hidden
    before = (out / "hidden" / CARD).read_text()
    monkeypatch.setattr("tetri.predict.train.write_card", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        train(texts, TrainSettings("hidden", out, "tiny", "weights-of-tiny", layer=2), made.quiet)
    assert (out / "hidden" / CARD).read_text() == before
    assert [path.name for path in out.iterdir()] == ["hidden"]
    texts = read_texts([made.lengths(tmp_path / "a.jsonl", 20)], states=False)
    with pytest.raises(PredictError, match="too few, 40 are needed"):
        train(texts, TrainSettings("classifier", tmp_path, "tiny", "w"), made.quiet)
    assert not (tmp_path / "classifier").exists()
