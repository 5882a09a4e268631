"""Loads a trained predictor: a folder with a sub-folder for each kind, `classifier` or `hidden`, each with a card and a
head (paper, section 3.3.2). Loading checks everything, so that errors show up when a worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tetri.predict.card import HEAD, KINDS, LATER, Card, cards, read_card
from tetri.predict.encoder import SHAPE, Encoder, find_encoder, load_encoder
from tetri.predict.heads import Array, Head, load_head
from tetri.predict.lengths import PredictError
from tetri.predict.quick import quick
from tetri.request import Expected, LengthDistribution

SHIPPED = Path(__file__).parent / "shipped"
AUTO = ("hidden", "classifier")  # the kinds that predictor.kind = "auto" tries with a model, in this order
PLACE = 3  # features for the number of known output tokens


@dataclass(frozen=True)
class Loaded:
    """A loaded predictor of one kind. `encoder` is None for the kind hidden."""

    card: Card
    head: Head
    encoder: Encoder | None

    @property
    def layer(self) -> int:
        """Number of layers after which the hidden state is read."""
        return self.card.layer

    @property
    def every(self) -> int:
        """Output tokens between two reads of the hidden state."""
        return self.card.every

    def expected(self, note: str) -> Expected:
        """The prior and the calibration for a worker's core. `note` is shown in the status."""
        return Expected(self.card.kind, LengthDistribution(self.card.width, self.card.prior), self.card.levels, note)

    def classify(self, texts: Sequence[str]) -> list[LengthDistribution]:
        """Predict the whole output of each prompt's text, in one batch. Raises PredictError for the kind hidden."""
        return self.read(texts)[0]

    def read(self, texts: Sequence[str]) -> tuple[list[LengthDistribution], list[int]]:
        """`classify`, and the encoder's token count of each text before the cut to `card.cut`."""
        if self.encoder is None:
            raise PredictError("a predictor of kind hidden reads no text")
        if not texts:
            return [], []
        vectors = self.encoder.vectors(texts)
        counts = np.rint(np.expm1(vectors[:, -SHAPE].astype(np.float64)))  # the first feature of `shape`
        return self._made(self.head.distribution(vectors)), [int(count) for count in counts]

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]:
        """Predict how many tokens follow. Raises PredictError for the kind classifier.

        `states`: float [n, hidden] after `layer` layers, at the last token of each text. `outputs`: known output tokens
        of each text, 0 at the prompt's end."""
        if self.encoder is not None:
            raise PredictError("a predictor of kind classifier reads no hidden states")
        rows = np.asarray(states, np.float32)
        if rows.ndim != 2 or rows.shape[1] + PLACE != self.head.inputs or len(rows) != len(outputs):
            raise PredictError(f"states of {self.head.inputs - PLACE} numbers are needed, these are {rows.shape}")
        if not len(rows):
            return []
        features, known = with_place(rows, outputs), np.asarray(outputs)
        distribution = np.empty((len(rows), self.head.buckets))
        for head, which in ((self.head, known == 0), (self.head.later or self.head, known > 0)):
            if which.any():
                distribution[which] = head.distribution(features[which])
        return self._made(distribution)

    def _made(self, distribution: npt.NDArray[np.float64]) -> list[LengthDistribution]:
        return [LengthDistribution(self.card.width, tuple(map(float, row))) for row in distribution]


def with_place(states: Array, outputs: Sequence[int]) -> Array:
    """Append the features of the known output tokens: [n, hidden] -> float32 [n, hidden + PLACE]."""
    known = np.asarray(outputs, np.float32)[:, None]
    place = [known == 0, np.log1p(known / 64.0), known / 1024.0]
    return np.concatenate([states, *(one.astype(np.float32) for one in place)], axis=1)


def examine(folder: Path, kind: str, weights: str = "") -> tuple[Card, Head]:
    """Check what `load` checks, except that the encoder is located but not loaded. Raises PredictError."""
    if kind not in KINDS:
        raise PredictError(f"there is no kind of predictor {kind!r}: {' or '.join(KINDS)}")
    card = read_card(folder, kind)
    if weights and card.weights != weights:
        raise PredictError(f"{folder / kind} is for another model ({card.model}, weights {card.weights}): train one")
    head = load_head(folder / kind / HEAD, card.head)
    if head.buckets != len(card.prior):
        raise PredictError(f"{folder / kind}: the head has {head.buckets} buckets, the card {len(card.prior)}")
    if kind == "classifier":
        find_encoder(card.encoder, folder / kind)
    if card.later:
        later = load_head(folder / kind / LATER, card.later)
        if (later.inputs, later.buckets) != (head.inputs, head.buckets):
            raise PredictError(f"{folder / kind}: {LATER} does not fit {HEAD}: train again")
        head = replace(head, later=later)
    return card, head


def load(folder: Path, kind: str, weights: str = "") -> Loaded:
    """Load one kind of a predictor, for the model with the hash `weights` ("": any model).

    Raises PredictError when it is missing, cut off, for another model, or of another version."""
    card, head = examine(folder, kind, weights)
    if kind == "hidden":
        return Loaded(card, head, None)
    encoder = load_encoder(card.encoder, card.cut, card.depth, folder / kind)
    if card.encoder_hash and encoder.digest != card.encoder_hash:
        raise PredictError(f"{folder / kind} was trained with another encoder than {card.encoder} as it is here")
    if encoder.vector != head.inputs:
        raise PredictError(f"{folder / kind}: the head does not fit the encoder {card.encoder}: train again")
    return Loaded(card, head, replace(encoder, model=quick(encoder.model)))


def load_first(folder: Path, kinds: Sequence[str], weights: str = "") -> tuple[Loaded, list[str]]:
    """Load the first of `kinds` that can be loaded, and return why those before it cannot. Raises PredictError with the
    reason of the first kind if there is none."""
    reasons: list[PredictError] = []
    for kind in kinds:
        try:
            return load(folder, kind, weights), [str(reason) for reason in reasons]
        except PredictError as error:
            reasons.append(error)
    raise reasons[0]


def shipped_for(weights: str) -> Path | None:
    """The folder of tetri's own predictor for the model with the hash `weights`; None if there is none."""
    folders = sorted(SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    return next((folder for folder in folders if any(card.weights == weights for card in cards(folder))), None)
