"""Heads in files."""

import numpy as np
import pytest

from tests.predict import made
from tetri.predict.heads import load_head, save_head


def test_a_head_comes_back_from_its_file(tmp_path):
    head = made.head(2)
    digest = save_head(head, tmp_path / "head", ["0123456789abcdef"])
    back = load_head(tmp_path / "head", digest)
    features = np.random.default_rng(9).normal(size=(50, 2)).astype("f4")
    assert back.distribution(features) == pytest.approx(head.distribution(features), abs=5e-3)
    assert back.has_seen("0123456789abcdef") and not back.has_seen("1123456789abcdef")
