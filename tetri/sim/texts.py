"""Texts that a model really wrote, in numbers: how long they are, and what predictors of their length said of them.

Read from the predictions that `tetri-cli predictor eval` writes: JSONL, a text a line.

prompt_tokens, tokens  of the prompt and of the output, the end of sequence included
width                  output tokens of a bucket; the last bucket is open
classifier             odds of the whole output, seen from the prompt: a share for each bucket
hidden                 the same, by the model's own hidden state at the prompt's last token
later                  by output tokens that were known: odds of those that follow, by the hidden state then
source                 where the prompt comes from

What a file does not know is left out; other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path
from typing import Any

from tetri.request import LengthDistribution

LIMIT = 1024  # output tokens at which the model was cut off, unless the reader is told
ROUNDED = 0.01  # shares are written with a few digits: they may add up to 1 within so much


class RecordedTextError(ValueError):
    """Texts cannot be read; one line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class RecordedText:
    """`prompt` and `output` tokens; the model was cut off at `limit`. `classifier`: odds of the whole output.
    `follows`: (output tokens that were known, odds of those that follow), ascending; 0 is the end of the prompt."""

    prompt: int
    output: int
    limit: int = LIMIT
    source: str = ""
    classifier: LengthDistribution | None = None
    follows: tuple[tuple[int, LengthDistribution], ...] = ()

    @property
    def reason(self) -> str:
        """Why it ended."""
        return "length" if self.output == self.limit else "stop"


def read(path: Path, limit: int = LIMIT) -> list[RecordedText]:
    """Raises TextError, with the number of the first line that is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordedTextError(f"{path}: cannot be read: {error.strerror or error}") from None
    texts = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            texts.append(_text(json.loads(line), limit))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RecordedTextError(f"{path}:{number}: no prediction of `predictor eval`: {error}") from None
    if not texts:
        raise RecordedTextError(f"{path}: there is no text in it: write it with `tetri-cli predictor eval`")
    return texts


def _text(row: Any, limit: int) -> RecordedText:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    prompt, output, width = (_count(row, name) for name in ("prompt_tokens", "tokens", "width"))
    if output > limit:
        raise ValueError(f"{output} tokens, more than the limit of {limit}")
    classifier = _distribution(row["classifier"], width) if row.get("classifier") is not None else None
    follows = {int(known): _distribution(shares, width) for known, shares in (row.get("later") or {}).items()}
    if row.get("hidden") is not None:
        follows[0] = _distribution(row["hidden"], width)
    if follows and not 0 <= min(follows) <= max(follows) < output:
        raise ValueError(f"of {output} tokens none can follow after {max(follows)}, or after {min(follows)}")
    states = tuple((known, follows[known]) for known in sorted(follows))
    return RecordedText(prompt, output, limit, str(row.get("source", "")), classifier, states)


def _count(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a number from 1 on, got {value!r}")
    return value


def _distribution(shares: Sequence[float], width: int) -> LengthDistribution:
    """Made to add up to 1 exactly as far as numbers can."""
    whole = fsum(shares)
    if not (isfinite(whole) and abs(whole - 1) <= ROUNDED and min(shares) >= 0):
        raise ValueError(f"shares must be 0 or more and add up to 1, got {whole:g}")
    return LengthDistribution(width, tuple(share / whole for share in shares))
