"""Trains a head (heads.py) on features: one small network per fold. The fold that a network is not trained on decides
when training stops, and calibrates the distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tetri.predict.examples import FOLDS, Ints, Rows
from tetri.predict.heads import Array, Head, shares
from tetri.predict.scores import Doubles

SIZE, DROPOUT, DECAY, RATE = 64, 0.5, 1.0, 1e-3
STEPS, BATCH, EVALUATE_STEPS = 600, 128, 25  # EVALUATE_STEPS: steps between two evaluations on the left-out fold
LEVELS = 39  # quantiles of the calibration that the card keeps
GOLDEN = 0.6180339887498949  # the fractional parts of its multiples are evenly spread over 0 to 1

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Fitted:
    """A trained head. `left_out`: the distributions [n, buckets], each by the network that was not trained on the row,
    NaN where there is none. `loss`: weighted mean negative log-likelihood of these."""

    head: Head
    left_out: Doubles
    loss: float


def buckets_of(limit: int, width: int) -> int:
    """Number of buckets of `width` tokens, such that only texts near the limit fall into the open last one."""
    return max((limit - 1) // width + 1, 2)


def fit(rows: Rows, width: int, buckets: int, seed: int, progress: Progress, *, networks: int = FOLDS) -> Fitted:
    """Train one network for each of the first `networks` folds, without the rows of that fold, and calibrate them."""
    plain = Head(*moments(rows.features, rows.weight), ())
    normed = plain.normed(rows.features)
    left_out = np.full((len(rows), buckets - 1), np.nan, np.float32)
    made = []
    for fold in range(networks):
        out = rows.fold == fold
        network, left_out[out] = _network(normed, rows, out, width, buckets, seed + fold)
        made.append(network)
        progress(f"network {fold + 1} of {networks}")
    return calibrated(replace(plain, networks=tuple(made)), left_out, rows, rows.fold < networks, width)


def calibrated(head: Head, logits: Array, rows: Rows, judged: npt.NDArray[np.bool_], width: int) -> Fitted:
    """Set the head's temperature by the rows `judged`. `logits`: of all rows, NaN where they are not judged."""
    some = rows.chosen(judged)
    temperature = temperature_of(logits[judged], some, width)
    distribution = shares(logits / temperature)
    loss = np.average(surprise(distribution[judged], some, width), weights=some.weight)
    return Fitted(replace(head, temperature=temperature), distribution, float(loss))


def moments(features: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted (mean, standard deviation) of each feature, float32 [inputs]; no deviation is 0."""
    mean = np.average(features, axis=0, weights=weight)
    scale = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weight))
    return mean.astype(np.float32), (scale + 1e-5).astype(np.float32)


def surprise(distribution: Doubles, rows: Rows, width: int) -> Doubles:
    """Negative log-likelihood [n] of the true lengths; for a text that was cut off, of that length or a longer one."""
    bucket = np.minimum(rows.tokens // width, distribution.shape[1] - 1)
    here = distribution[np.arange(len(distribution)), bucket]
    beyond = np.cumsum(distribution[:, ::-1], axis=1)[:, ::-1][np.arange(len(distribution)), bucket]
    return np.asarray(-np.log(np.maximum(np.where(rows.open, beyond, here), 1e-9)))


def temperature_of(logits: Array, rows: Rows, width: int) -> float:
    """The divisor of the logits with the least negative log-likelihood."""
    tried = np.geomspace(0.6, 2.0, 29)
    losses = [np.average(surprise(shares(logits / one), rows, width), weights=rows.weight) for one in tried]
    return round(float(tried[int(np.argmin(losses))]), 4)


def transform(distribution: Doubles, tokens: Ints, open_: npt.NDArray[np.bool_], width: int) -> Doubles:
    """The probability integral transform [n]: the predicted share at or below the true length, linear within a bucket.

    The true place of a text that was cut off, or that is in the last bucket, is unknown: such texts are spread evenly
    over the share beyond."""
    bucket = np.minimum(tokens // width, distribution.shape[1] - 1)
    sums = np.concatenate([np.zeros((len(distribution), 1)), np.cumsum(distribution, axis=1)], axis=1)
    row = np.arange(len(distribution))
    inside = np.clip((tokens + 0.5 - bucket * width) / width, 0.0, 1.0)
    here = sums[row, bucket] + distribution[row, bucket] * inside
    last = bucket == distribution.shape[1] - 1
    beyond = np.where(last, sums[row, bucket], here)
    spread = beyond + (1.0 - beyond) * (((row + 1) * GOLDEN) % 1.0)
    return np.asarray(np.where(last | open_, spread, here))


def levels_of(distribution: Doubles, tokens: Ints, open_: npt.NDArray[np.bool_], width: int) -> tuple[float, ...]:
    """The calibration levels, as in tetri.request.Expected: quantiles of `transform`."""
    at = np.quantile(transform(distribution, tokens, open_, width), np.arange(1, LEVELS + 1) / (LEVELS + 1))
    return tuple(round(float(min(max(level, 0.0), 1.0)), 4) for level in at)


def loss_of(logits: Any, bucket: Any, open_: Any) -> Any:
    """Negative log-likelihood [n] of discrete hazards: a text survives the buckets before its own, and ends in its own
    unless it was cut off (`open_`)."""
    import torch
    from torch.nn.functional import logsigmoid

    place = torch.arange(logits.shape[1])[None]
    lives = place < bucket[:, None]
    ends = (place == bucket[:, None]) & ~open_[:, None]
    return -(logsigmoid(-logits) * lives + logsigmoid(logits) * ends).sum(1)


def first_guess(rows: Rows, width: int, buckets: int) -> Array:
    """Logits of the hazards over all rows, float32 [buckets - 1]."""
    bucket, place = rows.tokens // width, np.arange(buckets - 1)
    alive = (bucket[:, None] >= place).sum(0)
    ends = ((bucket[:, None] == place) & ~rows.open[:, None]).sum(0)
    hazard = (ends + 0.5) / (alive + 1.0)
    return np.asarray(np.log(hazard / (1.0 - hazard)), np.float32)


def fresh(inputs: int, guess: Array) -> Any:
    """An untrained network whose output is close to `guess`."""
    import torch
    from torch import nn

    outputs = nn.Linear(SIZE, len(guess))
    with torch.no_grad():
        outputs.bias.copy_(torch.tensor(guess))
        outputs.weight.mul_(0.1)
    return nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(inputs, SIZE), nn.ReLU(), nn.Dropout(DROPOUT), outputs)


def layers(network: Any) -> tuple[tuple[Array, Array], ...]:
    """The (weight [out, in], bias [out]) of each linear layer, as heads.Head stores them."""
    return tuple(
        (network[at].weight.detach().float().numpy().copy(), network[at].bias.detach().float().numpy().copy())
        for at in (1, 4)
    )


def _network(
    normed: Array, rows: Rows, out: npt.NDArray[np.bool_], width: int, buckets: int, seed: int
) -> tuple[tuple[tuple[Array, Array], ...], Array]:
    """Train one network. Returns (layers, logits of the rows `out`) of the evaluation with the least loss."""
    import torch

    torch.set_num_threads(1)  # the batches are too small for a second thread to pay
    torch.manual_seed(seed)
    network = fresh(normed.shape[1], first_guess(rows, width, buckets))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    features, weight = torch.tensor(normed[~out]), torch.tensor(rows.weight[~out])
    bucket, open_ = torch.tensor(rows.tokens[~out] // width), torch.tensor(rows.open[~out])
    watched = torch.tensor(normed[out])
    judged = rows.chosen(out)
    best: tuple[float, Any, Any] = (np.inf, None, None)
    for step, batch in enumerate(_batches(len(features)), start=1):
        network.train()
        losses = loss_of(network(features[batch]), bucket[batch], open_[batch])
        loss = (losses * weight[batch]).sum() / weight[batch].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_STEPS == 0:
            network.eval()
            with torch.inference_mode():
                logits = network(watched).numpy()
            now = float(np.average(surprise(shares(logits), judged, width), weights=judged.weight))
            best = min(best, (now, layers(network), logits), key=lambda one: one[0])
    return best[1], best[2]


def _batches(count: int) -> Iterator[Any]:
    import torch

    left: list[Any] = []
    for _ in range(STEPS):
        left = left or list(torch.randperm(count).split(BATCH))
        yield left.pop()
