"""Trains the encoder together with a head. Much slower than training a head alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tetri.predict.encoder import Encoder, shape
from tetri.predict.examples import Ints, Rows
from tetri.predict.fit import RATE, Fitted, Progress, calibrated, first_guess, fresh, layers, loss_of, moments
from tetri.predict.heads import CLIP, Array, Head
from tetri.predict.lengths import Length

BATCH = 32
ENCODER_RATE, WARM = 1e-4, 0.1  # learning rate, share of the steps in which it rises
SORTED = 8  # batches whose prompts are sorted by length together, to reduce padding
LEFT_OUT = 0  # the fold that is not trained on


@dataclass(frozen=True)
class Prompts:
    """The encoder's input of each row: the cut token ids of its prompt, and the features of encoder.shape."""

    ids: list[list[int]]
    shapes: Array


def tune(
    encoder: Encoder,
    lengths: Sequence[Length],
    rows: Rows,
    width: int,
    buckets: int,
    epochs: int,
    seed: int,
    progress: Progress,
) -> tuple[Encoder, Fitted, Rows]:
    """Train the encoder in place. Returns (encoder, head, rows with the encoder's features).

    `Fitted.left_out` is NaN for the rows that were trained on."""
    import torch

    torch.manual_seed(seed)
    whole = encoder.ids([length.prompt for length in lengths])
    shapes = np.array([shape(length.prompt, len(one)) for length, one in zip(lengths, whole, strict=True)], np.float32)
    prompts = Prompts([encoder.short(one) for one in whole], shapes)
    training = rows.fold != LEFT_OUT
    plain = Head(*moments(_features(encoder, prompts)[training], rows.weight[training]), ())
    network = fresh(encoder.vector, first_guess(rows.chosen(training), width, buckets))
    _learn(encoder, network, plain, prompts, rows, width, epochs, seed, progress)
    rows = replace(rows, features=_features(encoder, prompts))
    with torch.inference_mode():
        logits = network(torch.tensor(plain.normed(rows.features))).numpy()
    logits[training] = np.nan
    return encoder, calibrated(replace(plain, networks=(layers(network),)), logits, rows, ~training, width), rows


def _learn(
    encoder: Encoder,
    network: Any,
    plain: Head,
    prompts: Prompts,
    rows: Rows,
    width: int,
    epochs: int,
    seed: int,
    progress: Progress,
) -> None:
    """Train the encoder and the network on all folds but LEFT_OUT."""
    import torch

    mean, scale = torch.tensor(plain.mean), torch.tensor(plain.scale)
    bucket, open_ = torch.tensor(rows.tokens // width), torch.tensor(rows.open)
    training, rng = np.flatnonzero(rows.fold != LEFT_OUT), np.random.default_rng(seed)
    optimizer, rate = _optimizer(encoder.model, network, epochs * math.ceil(len(training) / BATCH))
    for epoch in range(epochs):
        encoder.model.train()
        network.train()
        lost = 0.0
        batches = _batches(training, prompts.ids, rng)
        for number, batch in enumerate(batches, start=1):
            vectors = encoder.pooled(*encoder.padded([prompts.ids[at] for at in batch]))
            vectors = torch.cat([vectors, torch.tensor(prompts.shapes[batch])], dim=1)
            normed = ((vectors - mean) / scale).clamp(-CLIP, CLIP)
            loss = loss_of(network(normed), bucket[batch], open_[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            lost += float(loss.detach())
            if number % 20 == 0 or number == len(batches):
                progress(f"epoch {epoch + 1} of {epochs}: {number} of {len(batches)} batches, loss {lost / number:.3f}")
    encoder.model.eval()
    network.eval()


def _optimizer(model: Any, network: Any, steps: int) -> tuple[Any, Any]:
    """(optimizer, learning rate schedule). The rate rises for the share WARM of the steps, then falls to 0."""
    import torch

    slow = {"params": list(model.parameters()), "lr": ENCODER_RATE, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW([slow, {"params": list(network.parameters()), "lr": RATE, "weight_decay": 1.0}])

    def share(step: int) -> float:
        return min(1.0, (step + 1) / (WARM * steps + 1)) * max(0.0, 1.0 - step / steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _batches(training: Ints, ids: Sequence[list[int]], rng: np.random.Generator) -> list[Any]:
    order = rng.permutation(training)
    found = []
    for start in range(0, len(order), BATCH * SORTED):
        near = sorted(order[start : start + BATCH * SORTED], key=lambda at: len(ids[at]))
        found += [np.array(near[at : at + BATCH]) for at in range(0, len(near), BATCH)]
    return [found[at] for at in rng.permutation(len(found))]


def _features(encoder: Encoder, prompts: Prompts) -> Array:
    import torch

    ids, size = prompts.ids, prompts.shapes.shape[1]
    found = np.zeros((len(ids), encoder.vector), np.float32)
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        with torch.inference_mode():
            found[batch, :-size] = encoder.pooled(*encoder.padded([ids[at] for at in batch])).numpy()
    found[:, -size:] = prompts.shapes
    return found
