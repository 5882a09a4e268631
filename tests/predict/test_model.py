from dataclasses import replace

import numpy as np
import pytest

from tests.predict import made
from tetri.predict.card import HEAD, LATER, read_card, write_card
from tetri.predict.heads import save_head
from tetri.predict.lengths import PredictError
from tetri.predict.model import PLACE, SHIPPED, examine, load, shipped_for
from tetri.request import Expected, LengthDistribution


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made.classifier(made.hidden(tmp_path_factory.mktemp("predictor")))


def test_hidden_states_to_a_distribution_of_what_follows(folder):
    found = load(folder, "hidden", "weights-of-tiny")
    assert (found.layer, found.every) == (2, 8)
    states = np.random.default_rng(1).normal(size=(3, 6)).astype("f4")
    distribution = found.estimate(states, [0, 0, 640])
    assert [len(one.shares) for one in distribution] == [made.BUCKETS] * 3 and distribution[0].width == made.WIDTH
    assert [sum(one.shares) for one in distribution] == pytest.approx([1.0] * 3)
    assert found.estimate(states[2:], [0]) != distribution[2:]  # how many are known matters
    (alone,) = found.estimate(states[:1], [0])
    assert alone.shares == pytest.approx(distribution[0].shares, abs=1e-6)  # a batch changes nothing
    assert found.estimate(states[:0], []) == []
    states = np.array([[np.inf, -np.inf, np.nan, 1e30, 0, 0]], "f4")
    (distribution,) = found.estimate(states, [0])
    assert sum(distribution.shares) == pytest.approx(1.0) and min(distribution.shares) >= 0


def test_texts_to_distributions(folder):
    found = load(folder, "classifier", "weights-of-tiny")
    texts = ["how long?", "write a story about a very long winter in the north", ""]
    together = found.classify(texts)
    alone = [found.classify([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert one.shares == pytest.approx(other.shares, abs=1e-5)  # padding changes nothing
        assert sum(one.shares) == pytest.approx(1.0)
    assert found.read(texts)[1] == [len(text) + 2 for text in texts]
    assert found.classify([]) == []


def test_each_kind_does_its_own_work_and_says_what_to_expect(folder):
    found = load(folder, "hidden").expected("file x")
    assert found == Expected("hidden", LengthDistribution(100, (0.4, 0.3, 0.1, 0.1, 0.1)), (0.25, 0.5, 0.75), "file x")
    with pytest.raises(PredictError, match="reads no text"):
        load(folder, "hidden").classify(["x"])
    with pytest.raises(PredictError, match="reads no hidden states"):
        load(folder, "classifier").estimate(np.zeros((1, 6)), [0])
    with pytest.raises(PredictError, match="states of 6 numbers"):
        load(folder, "hidden").estimate(np.zeros((1, 7)), [0])


def test_what_is_missing_does_not_fit_or_is_of_another_model(folder, tmp_path):
    made.says(folder, "hidden", "another model", "tiny", weights="others")
    made.says(tmp_path, "hidden", "no hidden predictor", "tetri-cli predictor train")
    made.says(tmp_path, "oracle", "no kind of predictor")
    kind = made.hidden(tmp_path) / "hidden"
    digest = save_head(made.head(6 + PLACE, buckets=made.BUCKETS + 2), kind / LATER)
    write_card(replace(read_card(tmp_path, "hidden"), later=digest), kind)
    made.says(tmp_path, "hidden", LATER, "train again")
    (kind / HEAD).unlink()
    made.says(tmp_path, "hidden", HEAD, "No such file")


def test_what_is_shipped_for_smollm2():
    folder = shipped_for(read_card(SHIPPED / "smollm2-135m", "hidden").weights)
    assert folder == SHIPPED / "smollm2-135m" and shipped_for("no such weights") is None
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1 << 20
    for kind in ("classifier", "hidden"):
        card, head = examine(folder, kind)
        assert (card.width, len(card.prior), head.buckets) == (50, 21, 21) and len(card.levels) == 39
        assert card.scores["acc"]["200"] >= card.scores["by_source"]["200"] + 0.03
        assert card.scores["mae"] < card.scores["by_length"]["mae"]
        assert card.scores["tau"] > card.scores["by_length"]["tau"] and card.ceiling["prompts"] > 400
        assert any("OPT-13B" in note for note in card.notes)
    found = load(folder, "hidden")
    distribution = found.estimate(np.zeros((2, 576), "f4"), [0, 64])
    assert [sum(one.shares) for one in distribution] == pytest.approx([1.0, 1.0]) and distribution[0] != distribution[1]
