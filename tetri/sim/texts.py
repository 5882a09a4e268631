"""Recorded texts of a model: their lengths and the predictions of their lengths.

Read from the predictions that `tetri-cli predictor eval` writes: JSONL, one text per line.

prompt_tokens, tokens  tokens of the prompt and of the output, including the end of sequence
width                  output tokens of a bucket; the last bucket has no upper end
classifier             predicted distribution of the output length, from the prompt: the share of each bucket
hidden                 the same, from the model's hidden state at the last prompt token
later                  known output tokens -> distribution of the remaining length, from the hidden state then
source                 where the prompt comes from

Unknown values are left out; other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path
from typing import Any

from tetri.request import LengthDistribution

LIMIT = 1024  # output tokens at which the model was cut off, by default
ROUNDED = 0.01  # shares are rounded in the file: their sum may differ from 1 by this much


class RecordedTextError(ValueError):
    """The file of texts cannot be read; one line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class RecordedText:
    """One text of `prompt` and `output` tokens; the model was cut off at `limit`. `classifier`: predicted distribution
    of the output length. `follows`: (known output tokens, distribution of the remaining ones), ascending; 0 means the
    end of the prompt."""

    prompt: int
    output: int
    limit: int = LIMIT
    source: str = ""
    classifier: LengthDistribution | None = None
    follows: tuple[tuple[int, LengthDistribution], ...] = ()

    @property
    def reason(self) -> str:
        """The finish reason: length or stop."""
        return "length" if self.output == self.limit else "stop"


def read(path: Path, limit: int = LIMIT) -> list[RecordedText]:
    """Read all texts. Raises RecordedTextError with the number of the first wrong line."""
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
            raise RecordedTextError(f"{path}:{number}: not a prediction of `predictor eval`: {error}") from None
    if not texts:
        raise RecordedTextError(f"{path}: the file has no text: create it with `tetri-cli predictor eval`")
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
        raise ValueError(f"known tokens must be from 0 to {output - 1}, got {min(follows)} to {max(follows)}")
    states = tuple((known, follows[known]) for known in sorted(follows))
    return RecordedText(prompt, output, limit, str(row.get("source", "")), classifier, states)


def _count(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _distribution(shares: Sequence[float], width: int) -> LengthDistribution:
    """Return the distribution, normalised to a sum of 1."""
    whole = fsum(shares)
    if not (isfinite(whole) and abs(whole - 1) <= ROUNDED and min(shares) >= 0):
        raise ValueError(f"shares must be 0 or more and add up to 1, got {whole:g}")
    return LengthDistribution(width, tuple(share / whole for share in shares))
