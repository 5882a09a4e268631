"""Trains the encoder itself together with a head: slower by far than a head on an encoder as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tetri.predict.encoder import Encoder, shape
from tetri.predict.examples import Ints, Rows
from tetri.predict.fit import RATE, Fitted, first_guess, fresh, layers, loss_of, moments, surprise, temperature_of
from tetri.predict.heads import Array, Head, shares
from tetri.predict.lengths import Length

BATCH = 32
ENCODER_RATE, WARM = 1e-4, 0.1
APART = 8  # batches that are sorted by length together, so that little is padding
LEFT_OUT = 0  # this fold of the rows is not learnt from

Say = Callable[[str], None]


def tune(
    encoder: Encoder, lengths: Sequence[Length], rows: Rows, width: int, buckets: int, epochs: int, seed: int, say: Say
) -> tuple[Encoder, Fitted, Rows]:
    """(the encoder, changed in place; the head; the rows with its features). What was learnt from has NaN as its odds
    that were left out."""
    import torch

    torch.manual_seed(seed)
    whole = encoder.ids([length.prompt for length in lengths])
    ids = [encoder.short(one) for one in whole]
    shapes = np.array([shape(length.prompt, len(one)) for length, one in zip(lengths, whole, strict=True)], np.float32)
    learnt = np.flatnonzero(rows.fold != LEFT_OUT)
    mean, scale = moments(_features(encoder, ids, shapes)[learnt], rows.weight[learnt])
    head = fresh(encoder.vector, first_guess(rows, width, buckets))
    train_all(encoder, head, (mean, scale), ids, shapes, rows, learnt, width, epochs, seed, say)
    rows = replace(rows, features=_features(encoder, ids, shapes))
    made = Head(mean, scale, (layers(head.eval()),))
    out = rows.fold == LEFT_OUT
    with torch.inference_mode():
        logits = head(torch.tensor(made.normed(rows.features))).numpy()
    left_out = rows.chosen(out)
    temperature = temperature_of(logits[out], left_out, width)
    odds = np.full((len(rows), buckets), np.nan)
    odds[out] = shares(logits[out] / temperature)
    loss = float(np.average(surprise(odds[out], left_out, width), weights=left_out.weight))
    return encoder, Fitted(replace(made, temperature=temperature), odds, loss), rows


def train_all(
    encoder: Encoder,
    head: Any,
    normal: tuple[Array, Array],
    ids: Sequence[list[int]],
    shapes: Array,
    rows: Rows,
    learnt: Ints,
    width: int,
    epochs: int,
    seed: int,
    say: Say,
) -> None:
    import torch

    mean, scale = (torch.tensor(one) for one in normal)
    bucket, open_ = torch.tensor(rows.tokens // width), torch.tensor(rows.open)
    model = encoder.model
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.parameters()), "lr": ENCODER_RATE, "weight_decay": 0.01},
            {"params": list(head.parameters()), "lr": RATE, "weight_decay": 1.0},
        ]
    )
    total = epochs * math.ceil(len(learnt) / BATCH)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARM * total + 1)) * max(0.0, 1.0 - step / total)
    )
    dice = np.random.default_rng(seed)
    for epoch in range(epochs):
        model.train()
        head.train()
        lost = 0.0
        batches = _batches(learnt, ids, dice)
        for number, batch in enumerate(batches, start=1):
            vectors = encoder.pooled(*encoder.padded([ids[at] for at in batch]))
            vectors = torch.cat([vectors, torch.tensor(shapes[batch])], dim=1)
            loss = loss_of(head(((vectors - mean) / scale).clamp(-8, 8)), bucket[batch], open_[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            lost += float(loss)
            if number % 20 == 0 or number == len(batches):
                say(f"epoch {epoch + 1} of {epochs}: {number} of {len(batches)} batches, loss {lost / number:.3f}")
    model.eval()


def _batches(learnt: Ints, ids: Sequence[list[int]], dice: np.random.Generator) -> list[Any]:
    order = dice.permutation(learnt)
    found = []
    for start in range(0, len(order), BATCH * APART):
        near = sorted(order[start : start + BATCH * APART], key=lambda at: len(ids[at]))
        found += [np.array(near[at : at + BATCH]) for at in range(0, len(near), BATCH)]
    return [found[at] for at in dice.permutation(len(found))]


def _features(encoder: Encoder, ids: Sequence[list[int]], shapes: Array) -> Array:
    import torch

    found = np.zeros((len(ids), encoder.vector), np.float32)
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        with torch.inference_mode():
            found[batch, : -shapes.shape[1]] = encoder.pooled(*encoder.padded([ids[at] for at in batch])).numpy()
    found[:, -shapes.shape[1] :] = shapes
    return found
