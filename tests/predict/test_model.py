import json
from dataclasses import replace

import numpy as np
import pytest

from tests.predict import made
from tetri.predict.card import CARD, HEAD, LATER, read_card, write_card
from tetri.predict.encoder import load_encoder
from tetri.predict.heads import save_head
from tetri.predict.lengths import PredictError
from tetri.predict.model import PLACE, SHIPPED, examine, load, shipped_for
from tetri.request import Expected, LengthDistribution


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made.classifier(made.hidden(tmp_path_factory.mktemp("predictor")))


def test_hidden_states_to_odds_of_what_follows(folder):
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


def test_a_state_out_of_all_bounds_still_has_odds(folder):
    found = load(folder, "hidden")
    states = np.array([[np.inf, -np.inf, np.nan, 1e30, 0, 0]], "f4")
    (distribution,) = found.estimate(states, [0])
    assert sum(distribution.shares) == pytest.approx(1.0) and min(distribution.shares) >= 0


def test_texts_to_odds(folder):
    found = load(folder, "classifier", "weights-of-tiny")
    texts = ["how long?", "write a story about a very long winter in the north", ""]
    together = found.classify(texts)
    alone = [found.classify([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert one.shares == pytest.approx(other.shares, abs=1e-5)  # padding changes nothing
        assert sum(one.shares) == pytest.approx(1.0)
    assert found.tokens(texts) == [len(text) + 2 for text in texts]
    assert found.classify([]) == []


def test_of_a_long_prompt_the_middle_is_not_read(folder):
    found = load(folder, "classifier")
    assert found.card.cut == 8
    assert found.encoder.short(list(range(12))) == [0, 1, 2, 3, 8, 9, 10, 11]
    one, other, different = (found.classify([text])[0] for text in ("abc1234xyz", "abc9876xyz", "abc1234xyw"))
    assert one.shares == pytest.approx(other.shares, abs=1e-6)
    assert one.shares != pytest.approx(different.shares, abs=1e-6)


def test_what_a_worker_expects(folder):
    found = load(folder, "hidden").expected("file x")
    assert found == Expected("hidden", LengthDistribution(100, (0.4, 0.3, 0.1, 0.1, 0.1)), (0.25, 0.5, 0.75), "file x")


def test_each_kind_does_its_own_work(folder):
    with pytest.raises(PredictError, match="reads no text"):
        load(folder, "hidden").classify(["x"])
    with pytest.raises(PredictError, match="reads no hidden states"):
        load(folder, "classifier").estimate(np.zeros((1, 6)), [0])
    with pytest.raises(PredictError, match="states of 6 numbers"):
        load(folder, "hidden").estimate(np.zeros((1, 7)), [0])


def says(folder, kind, *words, weights="weights-of-tiny"):
    with pytest.raises(PredictError) as caught:
        load(folder, kind, weights)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_another_models(folder):
    says(folder, "hidden", "another model", "tiny", weights="others")


def test_missing(tmp_path):
    says(tmp_path, "hidden", "no hidden predictor", "tetri-cli predictor train")
    says(tmp_path, "oracle", "no kind of predictor")


@pytest.mark.parametrize("file", [CARD, HEAD])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_cut_off(tmp_path, file, share):
    path = made.hidden(tmp_path) / "hidden" / file
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    says(tmp_path, "hidden", str(path), "train again")


def test_a_missing_head(tmp_path):
    (made.hidden(tmp_path) / "hidden" / HEAD).unlink()
    says(tmp_path, "hidden", HEAD, "No such file")


def test_a_head_of_later_positions_that_does_not_fit(tmp_path):
    kind = made.hidden(tmp_path) / "hidden"
    digest = save_head(made.head(6 + PLACE, buckets=made.BUCKETS + 2), kind / LATER)
    write_card(replace(read_card(tmp_path, "hidden"), later=digest), kind)
    says(tmp_path, "hidden", LATER, "train again")


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
    ],
)
def test_a_card_that_is_wrong(tmp_path, change, word):
    path = made.hidden(tmp_path) / "hidden" / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    says(tmp_path, "hidden", word)


def test_a_card_without_a_field(tmp_path):
    path = made.hidden(tmp_path) / "hidden" / CARD
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "head"}))
    says(tmp_path, "hidden", "has no 'head'")


def test_another_encoder(tmp_path):
    folder = made.classifier(tmp_path) / "classifier"
    card = read_card(tmp_path, "classifier")
    path = folder / "encoder" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    says(tmp_path, "classifier", "another encoder")
    path.unlink()
    says(tmp_path, "classifier", "cannot be loaded")
    write_card(card, folder)
    assert read_card(tmp_path, "classifier") == card


def test_a_decoder_is_read_at_its_last_token(tmp_path):
    decoder = load_encoder(str(made.encoder(tmp_path / "llama", "llama")), 16)
    encoder = load_encoder(str(made.encoder(tmp_path / "bert")), 16)
    assert (decoder.causal, encoder.causal) == (True, False)
    texts = ["abc", "abcdef"]
    assert decoder.vectors(texts) == pytest.approx(np.concatenate([decoder.vectors([one]) for one in texts]), abs=1e-5)


def test_fewer_layers(tmp_path):
    folder = str(made.encoder(tmp_path / "bert"))
    half, whole = load_encoder(folder, 16, depth=1), load_encoder(folder, 16, depth=2)
    assert load_encoder(folder, 16).depth == 1  # two thirds
    assert not np.allclose(half.vectors(["abc"]), whole.vectors(["abc"]))


def test_nothing_is_shipped_for_an_unknown_model():
    assert shipped_for("no such weights") is None


def test_what_is_shipped_for_smollm2():
    folder = shipped_for(read_card(SHIPPED / "smollm2-135m", "hidden").weights)
    assert folder == SHIPPED / "smollm2-135m"
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
