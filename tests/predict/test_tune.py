"""An encoder that is trained with its head."""

import pytest

from tests.predict import made
from tetri.predict.card import read_card
from tetri.predict.examples import read_texts
from tetri.predict.model import load
from tetri.predict.train import TrainSettings, train

pytestmark = pytest.mark.usefixtures("little_to_learn")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_encoder_too(lengths_file, tmp_path, kind):
    encoder = made.encoder(tmp_path / kind, kind)
    texts = read_texts([lengths_file], states=False)
    (tmp_path / "out").mkdir()
    how = dict(encoder=str(encoder), cut=32, depth=2, full=True, epochs=12)
    found = train(texts, TrainSettings("classifier", tmp_path / "out", "tiny", "weights-of-tiny", **how), made.quiet)
    card = read_card(tmp_path / "out", "classifier")
    assert card.encoder == "encoder" and card.split["networks"] == 1 and card.levels
    loaded = load(tmp_path / "out", "classifier")  # with the encoder that lies in the folder
    assert loaded.encoder.digest == card.encoder_hash
    before = (encoder / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "classifier" / "encoder" / "model.safetensors").read_bytes() != before
    assert found["acc"]["100"] > found["majority"]["100"] + 0.2
