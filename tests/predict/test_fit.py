"""A head learns what is there to learn, says how sure it is, and takes cut-off texts for what they are."""

import numpy as np
import pytest
import torch

from tetri.predict import fit
from tetri.predict.examples import FOLDS, Rows
from tetri.predict.heads import shares

pytestmark = pytest.mark.usefixtures("little_to_learn")
WIDTH, BUCKETS = 50, 9  # the last from 400 on


def rows(count=400, seed=0, limit=450):
    """Texts whose length is 100 or 300, or so, by one feature; another one means nothing."""
    dice = np.random.default_rng(seed)
    long = dice.integers(0, 2, count)
    length = np.where(long, 300, 100) + dice.normal(0, 40, count)
    length = np.maximum(length, 1).astype(int)
    features = np.stack([long + dice.normal(0, 0.1, count), dice.normal(size=count)], axis=1).astype("f4")
    zeros = np.zeros(count, np.int64)
    tokens, open_ = np.minimum(length, limit), length >= limit
    return Rows(features, tokens, open_, np.arange(count) % FOLDS, np.ones(count, "f4"), zeros)


@pytest.fixture(scope="module")
def fitted(little_to_learn):
    return fit.fit(rows(), WIDTH, BUCKETS, 0, lambda line: None)


def test_it_learns_the_same_from_the_same_seed_and_what_was_left_out_is_calibrated(fitted):
    distribution = fitted.head.distribution(np.array([[0.0, 0.0], [1.0, 0.0]], "f4"))
    assert distribution.shape == (2, BUCKETS) and distribution.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert distribution[0, :4].sum() > 0.8 and distribution[1, 4:].sum() > 0.8
    prior = fit.surprise(np.full((400, BUCKETS), 1 / BUCKETS), rows(), WIDTH).mean()
    assert fitted.loss < prior - 0.3
    again = fit.fit(rows(), WIDTH, BUCKETS, 0, lambda line: None)
    assert np.array_equal(again.left_out, fitted.left_out)
    places = fit.transform(fitted.left_out, rows().tokens, rows().open, WIDTH)
    assert np.mean(places) == pytest.approx(0.5, abs=0.05)
    assert np.quantile(places, [0.25, 0.75]) == pytest.approx([0.25, 0.75], abs=0.08)


def test_cut_off_texts_teach_that_they_got_so_far():
    """All texts end at 300, but half of them were cut off at 100: nobody may learn that texts end at 100."""
    count = 200
    cut = np.arange(count) % 8 < 4
    tokens = np.where(cut, 100, 300)
    features = np.random.default_rng(0).normal(size=(count, 2)).astype("f4")
    given = Rows(features, tokens, cut, np.arange(count) % FOLDS, np.ones(count, "f4"), np.zeros(count, np.int64))
    distribution = fit.fit(given, WIDTH, BUCKETS, 0, lambda line: None).head.distribution(features).mean(axis=0)
    assert distribution[6] > 0.85 and distribution[2] < 0.05


def test_the_loss_is_that_of_the_distribution():
    logits = np.random.default_rng(2).normal(size=(3, BUCKETS - 1)).astype("f4")
    distribution = shares(logits)
    bucket = np.array([0, 4, BUCKETS - 1])
    ended, cut = (
        fit.loss_of(torch.tensor(logits), torch.tensor(bucket), torch.tensor([cut] * 3)).numpy()
        for cut in (False, True)
    )
    assert ended == pytest.approx(-np.log(distribution[np.arange(3), bucket]), rel=1e-4)
    beyond = [distribution[row, at:].sum() for row, at in enumerate(bucket)]
    assert cut == pytest.approx(-np.log(beyond), rel=1e-4, abs=1e-6)


def test_the_first_guess_is_what_all_texts_are_like_and_temperature_undoes_overconfidence():
    given = rows(4000)
    distribution = shares(fit.first_guess(given, WIDTH, BUCKETS)[None])[0]
    real = np.bincount(np.minimum(given.tokens // WIDTH, BUCKETS - 1), minlength=BUCKETS) / 4000
    assert distribution == pytest.approx(real, abs=0.01)
    assert [fit.buckets_of(limit, 50) for limit in (1024, 1000, 256, 30)] == [21, 20, 6, 2]
    dice = np.random.default_rng(3)
    logits = dice.normal(size=(4000, BUCKETS - 1)).astype("f4")
    sums = np.cumsum(shares(logits), axis=1)
    bucket = (dice.random((4000, 1)) > sums).sum(axis=1).clip(0, BUCKETS - 1)
    zeros = np.zeros(4000, np.int64)
    given = Rows(np.empty((4000, 0), "f4"), bucket * WIDTH, zeros > 0, zeros, np.ones(4000, "f4"), zeros)
    assert fit.temperature_of(logits, given, WIDTH) == pytest.approx(1.0, abs=0.1)
    assert fit.temperature_of(logits * 1.6, given, WIDTH) == pytest.approx(1.6, abs=0.15)


def test_places_of_texts_that_were_cut_off_are_spread_over_what_lies_beyond():
    distribution = np.array([[0.5, 0.25, 0.25]] * 100)
    places = fit.transform(distribution, np.full(100, 50), np.full(100, True), 50)
    assert places.min() == pytest.approx(0.5, abs=0.02) and places.max() == pytest.approx(1.0, abs=0.02)
    assert places.mean() == pytest.approx(0.75, abs=0.01)
    assert fit.transform(distribution[:1], np.array([25]), np.array([False]), 50) == pytest.approx([0.255])
