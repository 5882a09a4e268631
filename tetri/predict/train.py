"""Trains a predictor and writes its folder: card, head and, if it was tuned, the encoder (paper, section 3.3.2)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tetri import atomic
from tetri.predict import examples
from tetri.predict.card import HEAD, LATER, Card, write_card
from tetri.predict.encoder import CUT, DEFAULT, Encoder, load_encoder
from tetri.predict.evaluate import Judged, ceiling_of, judge, report
from tetri.predict.examples import FEWEST, FOLDS, HELD_OUT, Rows, Texts
from tetri.predict.fit import Fitted, Progress, buckets_of, fit, levels_of
from tetri.predict.heads import Array, save_head
from tetri.predict.lengths import Length, PredictError
from tetri.predict.model import load, with_place
from tetri.predict.scores import Doubles

WIDTH = 50  # tokens per bucket
NOTES = (
    "This folder contains no prompts: the head keeps 32 bits of the hash of each training prompt.",
    "The 58.9 / 74.9 / 85 % at 100 / 200 / 400 tokens of the paper belong to another model (OPT-13B), other prompts"
    " (75 thousand of ShareGPT) and another predictor (OPT-125M); they do not apply to this one.",
)


@dataclass(frozen=True)
class TrainSettings:
    """What to train. `layer` 0: the best of the kept layers. `depth` 0: two thirds of the encoder's layers. `full`: the
    encoder is trained too."""

    kind: str
    out: Path
    model: str
    weights: str
    encoder: str = DEFAULT
    full: bool = False
    cut: int = CUT
    depth: int = 0
    layer: int = 0
    seed: int = 0
    epochs: int = 4
    date: str = ""


def train(texts: Texts, settings: TrainSettings, progress: Progress) -> dict[str, Any]:
    """Train, write the folder `settings.out`/`settings.kind`, and return the `report` on the held-out part.

    Raises PredictError and OSError; the folder then does not appear."""
    training, held = _parts(texts, settings.seed)
    started = time.monotonic()
    folder = settings.out / settings.kind
    with atomic.folder(folder) as part:
        make = _hidden if settings.kind == "hidden" else _classifier
        card = make(texts, training, settings, part, progress)
        write_card(card, part)
        loaded = {settings.kind: load(part.parent, settings.kind, settings.weights)}
        found = report(judge(loaded, texts, _first(held), progress), _first(training), loaded)
        found["left_out"] = card.scores
        extra = {"train_seconds": round(time.monotonic() - started)}
        write_card(replace(card, scores=found, split=card.split | extra), part)
    return found | {"out": str(folder), "ceiling": card.ceiling}


def _parts(texts: Texts, seed: int) -> tuple[list[Length], list[Length]]:
    """(texts to train on, held-out texts). Raises PredictError when there are too few."""
    held = [length for length in texts.lengths if examples.is_held_out(length, seed)]
    training = [length for length in texts.lengths if not examples.is_held_out(length, seed)]
    prompts = len(_first(training))
    if prompts < FEWEST or not held:
        raise PredictError(f"{prompts} prompts to learn from are too few, {FEWEST} are needed: collect more")
    return training, held


def _first(lengths: Sequence[Length]) -> list[Length]:
    return Texts(list(lengths), {}, {}, []).first()


def _hidden(texts: Texts, training: list[Length], settings: TrainSettings, folder: Path, progress: Progress) -> Card:
    layers = (settings.layer,) if settings.layer else texts.layers
    if not layers:
        raise PredictError("the lengths have no hidden states: collect with --layers")
    buckets = buckets_of(texts.limit, WIDTH)
    best: tuple[float, int, Fitted, Rows] | None = None
    tried = {}
    for layer in layers:
        rows = examples.state_rows(texts, training, layer, settings.seed)
        rows = replace(rows, features=with_place(rows.features, rows.known.tolist()))
        ends = rows.chosen(rows.known == 0)
        progress(f"layer {layer}: {len(ends)} ends of prompts")
        fitted = fit(ends, WIDTH, buckets, settings.seed, progress)
        tried[str(layer)] = round(fitted.loss, 4)
        if best is None or fitted.loss < best[0]:
            best = (fitted.loss, layer, fitted, rows)
    assert best is not None
    _, layer, fitted, rows = best
    card = _card(texts, training, settings, fitted, rows.chosen(rows.known == 0), folder)
    after = rows.chosen(rows.known > 0)
    progress(f"layer {layer}: {len(after)} later positions")
    later = ""
    if len(after) >= FEWEST and (after.fold == 0).any():  # one network: many examples, and the file stays small
        later = save_head(fit(after, WIDTH, buckets, settings.seed, progress, networks=1).head, folder / LATER)
    split = card.split | {"loss_by_layer": tried, "later_positions": len(after)}
    return replace(card, layer=layer, every=int(texts.plan.get("every", 0)), split=split, later=later)


def _classifier(
    texts: Texts, training: list[Length], settings: TrainSettings, folder: Path, progress: Progress
) -> Card:
    encoder = load_encoder(settings.encoder, settings.cut, settings.depth)
    rows = _rows(training, settings.seed)
    buckets = buckets_of(texts.limit, WIDTH)
    name, digest = settings.encoder, encoder.digest
    if settings.full:
        from tetri.predict.tune import tune

        encoder, fitted, rows = tune(encoder, training, rows, WIDTH, buckets, settings.epochs, settings.seed, progress)
        name, digest = "encoder", encoder.save(folder / "encoder")
    else:
        rows = replace(rows, features=_vectors(encoder, [length.prompt for length in training], progress))
        fitted = fit(rows, WIDTH, buckets, settings.seed, progress)
    card = _card(texts, training, settings, fitted, rows, folder)
    return replace(card, encoder=name, encoder_hash=digest, cut=settings.cut, depth=encoder.depth)


def _rows(lengths: Sequence[Length], seed: int) -> Rows:
    """Training rows without features."""
    tokens = np.array([length.tokens for length in lengths])
    cut = np.array([length.ended == "length" for length in lengths])
    folds, weights = examples.folds_of(lengths, seed), examples.weights_of(lengths)
    return Rows(np.empty((0, 0), np.float32), tokens, cut, folds, weights, np.zeros(len(lengths), np.int64))


BATCH = 32  # prompts per batch of the encoder


def _vectors(encoder: Encoder, prompts: Sequence[str], progress: Progress) -> Array:
    """Features of each text. Each distinct prompt is computed once."""
    different = sorted(set(prompts), key=len)
    found: dict[str, Array] = {}
    for start in range(0, len(different), BATCH):
        batch = different[start : start + BATCH]
        found |= zip(batch, encoder.vectors(batch), strict=True)
        if start // BATCH % 20 == 0:
            progress(f"encoder: {start} of {len(different)} prompts")
    return np.stack([found[prompt] for prompt in prompts])


def _card(
    texts: Texts, training: Sequence[Length], settings: TrainSettings, fitted: Fitted, rows: Rows, folder: Path
) -> Card:
    """Save the head in `folder` and make its card."""
    judged = np.isfinite(fitted.left_out[:, 0])  # with --full, only the fold that was not trained on
    levels = levels_of(fitted.left_out[judged], rows.tokens[judged], rows.open[judged], WIDTH)
    counts = np.bincount(np.minimum(rows.tokens // WIDTH, fitted.head.buckets - 1), rows.weight, fitted.head.buckets)
    prior = (counts + 0.5) / (counts + 0.5).sum()
    keys = [length.key[0] for length in training]
    split: dict[str, Any] = {"seed": settings.seed, "held_out": HELD_OUT}
    split |= {"by": "xxh3 of the seed and the prompt's hash", "prompts_learnt": len(set(keys))}
    split |= {"networks": len(fitted.head.networks), "left_out_of_each": 1 / FOLDS}
    split |= {"temperature": fitted.head.temperature, "loss": round(fitted.loss, 4), "full": settings.full}
    return Card(
        *(settings.kind, settings.model, settings.weights, WIDTH),
        prior=tuple(round(float(share), 6) for share in prior),
        levels=levels,
        head=save_head(fitted.head, folder / HEAD, keys),
        data=_data(texts),
        scores=_left_out(texts, training, settings.kind, fitted.left_out),
        split=split,
        ceiling=ceiling_of(texts),
        notes=NOTES,
        date=settings.date,
    )


def _left_out(texts: Texts, training: Sequence[Length], kind: str, distribution: Doubles) -> dict[str, Any]:
    """Scores on the training prompts, each predicted by the network that was not trained on it.

    There are more of these prompts than held-out ones, but the scores are optimistic: they decide when training stops.
    """
    known = np.flatnonzero(np.isfinite(distribution[:, 0]))
    first = [at for at in known if training[at].sample == 0]
    judged = Judged([training[at] for at in first], {kind: distribution[first]}, {}, WIDTH, texts.limit)
    return report(judged, [], {})


def _data(texts: Texts) -> dict[str, Any]:
    first = texts.first()
    found: dict[str, Any] = {"prompts": len(first), "texts": len(texts.lengths), "limit": texts.limit}
    found |= {name: texts.plan[name] for name in ("temperature", "seed") if name in texts.plan}
    found["cut_off_by_the_limit"] = round(float(np.mean([length.ended == "length" for length in first])), 4)
    found["sources"] = dict(Counter(length.source or "unknown" for length in first).most_common())
    return found
