"""The card of a trained head: a JSON file that names the target model, the training data and the scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tetri import atomic
from tetri.predict.lengths import PredictError

VERSION = 1
KINDS = ("classifier", "hidden")
CARD, HEAD, LATER = "card.json", "head.safetensors", "later.safetensors"


@dataclass(frozen=True)
class Card:
    """Describes one trained head; stored in `<folder>/<kind>/card.json`.

    kind          classifier: an encoder reads the prompt's text; hidden: the head reads the target model's hidden state
    model         the target model's name, for display only
    weights       hash of the target model's weights; the head is valid for these weights only
    width         output tokens per bucket; there are len(prior) buckets and the last one has no upper end
    prior         share of the training lengths in each bucket
    levels        calibration, see tetri.request.Expected
    head          xxh3 of head.safetensors
    later         hidden: xxh3 of later.safetensors, the head for positions after the prompt's end; "": the same head
    encoder       classifier: name or path of the encoder; a path inside the card's own folder comes first
    encoder_hash  classifier: hash of the encoder's weights
    cut           classifier: of a prompt with more tokens, the encoder reads the first and the last cut / 2
    depth         classifier: number of encoder layers that are computed; 0: two thirds of them
    layer         hidden: number of layers after which the state is read
    every         hidden: output tokens between two reads

    `data`, `split`, `scores` and `ceiling` (both on the held-out part), `notes` and `date` document the training.
    """

    kind: str
    model: str
    weights: str
    width: int
    prior: tuple[float, ...]
    levels: tuple[float, ...]
    head: str
    encoder: str = ""
    encoder_hash: str = ""
    cut: int = 0
    depth: int = 0
    later: str = ""
    layer: int = 0
    every: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    ceiling: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    date: str = ""
    version: int = VERSION


def write_card(card: Card, folder: Path) -> None:
    """Write `folder`/card.json atomically. Raises OSError."""
    atomic.write_text(folder / CARD, json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")


def read_card(folder: Path, kind: str) -> Card:
    """Read and check the card of that kind from the predictor in `folder`. Raises PredictError."""
    path = folder / kind / CARD
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise PredictError(f"no {kind} predictor in {folder}: {path}: {reason}; make one: {_MAKE}") from None
    except ValueError:
        raise PredictError(f"{path} is cut off or no card: train again: {_MAKE}") from None
    version = row.get("version") if isinstance(row, dict) else None
    if version != VERSION:
        raise PredictError(f"{path} is of version {version}, this program reads {VERSION}: train again: {_MAKE}")
    if wrong := _wrong(row, kind):
        raise PredictError(f"{path}: {wrong}: train again: {_MAKE}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Card(**values)


def cards(folder: Path) -> Iterator[Card]:
    """Yield the cards in a predictor's folder that can be read."""
    for kind in KINDS:
        with suppress(PredictError):
            yield read_card(folder, kind)


_MAKE = "tetri-cli predictor train"


def _wrong(row: dict[str, Any], kind: str) -> str:
    """Return what is wrong with a card's fields, or ""."""
    kinds = {"str": str, "int": int, "dict[str, Any]": dict}
    for one in fields(Card):
        if one.name not in row:
            if one.default is MISSING and one.default_factory is MISSING:
                return f"it has no {one.name!r}"
            continue
        value, wanted = row[one.name], kinds.get(str(one.type), list)
        if not isinstance(value, wanted) or isinstance(value, bool):
            return f"{one.name!r} is no {wanted.__name__}"
    if unknown := set(row) - {one.name for one in fields(Card)}:
        return f"it has an unknown {min(unknown)!r}"
    if row["kind"] != kind or kind not in KINDS:
        return f"it is of kind {row['kind']!r}, not {kind!r}"
    numbers = [*row["prior"], *row["levels"]]
    if not all(isinstance(one, int | float) and 0 <= one <= 1 for one in numbers):
        return "'prior' and 'levels' must be numbers from 0 to 1"
    if len(row["prior"]) < 2 or abs(sum(row["prior"]) - 1) > 1e-3 or row["width"] < 1:
        return "'prior' must have shares of at least two buckets that add up to 1"
    return ""
