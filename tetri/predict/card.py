"""What stands beside a trained head: what it predicts for whom, how it was made, how good it is. JSON, read by people
too."""

from __future__ import annotations

import json
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
    """Of one trained head, in `<folder>/<kind>/card.json`.

    kind          classifier: from the prompt's text, by an encoder; hidden: from the target model's own hidden state
    model         the target model's name, for people; `weights`: the hash of its weights, for which the head is meant
    width         output tokens of a bucket; the last bucket, of len(prior), is open
    prior         how the output lengths of training were spread over the buckets
    levels        calibration, see tetri.request.Expected
    head          xxh3 of head.safetensors
    later         hidden: xxh3 of later.safetensors, the head for the positions after the prompt's end; "": the same one
    encoder       classifier: name or path of the encoder, a path within the card's own folder first; `encoder_hash`: of
                  its weights
    cut           classifier: of a longer prompt the encoder reads the first and the last cut / 2 tokens
    depth         classifier: how many of the encoder's layers are computed; 0: two thirds
    layer, every  hidden: after how many layers the state is taken; again every so many output tokens

    The others say where it comes from: `data`, `split`, `scores` and `ceiling` on the held-out part, `notes`, `date`.
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
    atomic.write_text(folder / CARD, json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")


def read_card(folder: Path, kind: str) -> Card:
    """Of the predictor in `folder`, the part of that kind. Raises PredictError."""
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


_MAKE = "tetri-cli predictor train"


def _wrong(row: dict[str, Any], kind: str) -> str:
    """What is wrong with a card's fields, or nothing."""
    kinds = {"str": str, "int": int, "dict[str, Any]": dict}
    for one in fields(Card):
        missing = one.default is MISSING and one.default_factory is MISSING
        if one.name not in row:
            if missing:
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
        return "'prior' must be shares of at least two buckets, which add up to 1"
    return ""
