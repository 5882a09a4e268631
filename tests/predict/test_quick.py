"""An encoder computed as fast as the processor can says the same."""

import copy

import numpy as np
import pytest
import torch

from tests.predict import made
from tetri.predict.encoder import load_encoder
from tetri.predict.quick import quick


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_features_differ_by_a_hundredth(kind, tmp_path):
    encoder = load_encoder(str(made.encoder(tmp_path / kind, kind)), 16)
    texts = ["why is the sky blue", "a", "a long text that is cut in its middle, where nobody looks", ""]
    exact = encoder.vectors(texts)
    quick(encoder.model)
    assert np.abs(encoder.vectors(texts) - exact).max() < 0.03 * np.abs(exact).max()


def test_weights_that_lie_otherwise_say_the_very_same(tmp_path):
    encoder = load_encoder(str(made.encoder(tmp_path / "bert")), 16)
    tokens, mask = encoder.padded([[2, 5, 6, 7, 3], [2, 9, 3]])
    plain = copy.deepcopy(encoder.model)
    quick(encoder.model)
    plain.to(next(encoder.model.parameters()).dtype)  # float32 where the processor multiplies no bfloat16
    with torch.inference_mode():
        both = [model(input_ids=tokens, attention_mask=mask).last_hidden_state for model in (plain, encoder.model)]
    assert torch.equal(*both)


def test_a_processor_without_bfloat16_computes_it_as_it_is(tmp_path, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    encoder = load_encoder(str(made.encoder(tmp_path / "bert")), 16)
    before = encoder.vectors(["abc"])
    quick(encoder.model)
    assert next(encoder.model.parameters()).dtype == torch.float32
    assert (encoder.vectors(["abc"]) == before).all()
