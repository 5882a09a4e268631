"""The encoder of a classifier: which, and what of a text it reads."""

import numpy as np
import pytest

from tests.predict import made
from tetri.predict.encoder import load_encoder
from tetri.predict.model import load


def test_another_encoder(tmp_path):
    folder = made.classifier(tmp_path) / "classifier"
    path = folder / "encoder" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    made.says(tmp_path, "classifier", "another encoder")
    path.unlink()
    made.says(tmp_path, "classifier", "cannot be loaded")


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


def test_of_a_long_prompt_the_middle_is_not_read(tmp_path):
    found = load(made.classifier(tmp_path), "classifier")
    assert found.card.cut == 8
    assert found.encoder.short(list(range(12))) == [0, 1, 2, 3, 8, 9, 10, 11]
    one, other, different = (found.classify([text])[0] for text in ("abc1234xyz", "abc9876xyz", "abc1234xyw"))
    assert one.shares == pytest.approx(other.shares, abs=1e-6)
    assert one.shares != pytest.approx(different.shares, abs=1e-6)
