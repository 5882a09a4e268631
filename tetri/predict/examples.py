"""The training and test data of a predictor: texts that the target model wrote, split by prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from tetri.predict.collect import plan_path
from tetri.predict.heads import Array
from tetri.predict.lengths import Length, PredictError, States, prompt_key, read_lengths, read_states, states_path

HELD_OUT = 0.15  # share of the prompts that is never trained on
FOLDS = 4  # parts of the rest: each calibrates the network that is trained on the others
FEWEST = 40  # prompts to train on

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """All texts of some files. `plan`: the settings they were collected with, {} if unknown; `bad`: one line for each
    line of a file that cannot be used."""

    lengths: list[Length]
    states: dict[tuple[str, int], States] = field(repr=False)
    plan: dict[str, Any]
    bad: list[str]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose hidden states were kept."""
        return tuple(self.plan.get("layers", ()))

    @property
    def limit(self) -> int:
        """Output tokens at which a text was cut off; if unknown, the length of the longest text."""
        longest = max((length.tokens for length in self.lengths), default=1)
        return int(self.plan.get("max_tokens", longest))

    def first(self) -> list[Length]:
        """The first text of each prompt."""
        found: dict[str, Length] = {}
        for length in sorted(self.lengths, key=lambda length: length.sample):
            found.setdefault(prompt_key(length.prompt), length)
        return list(found.values())


def read_texts(files: Sequence[Path], *, states: bool) -> Texts:
    """Read the texts of `files`, with their hidden states if `states` is set.

    Raises PredictError, also when the files were collected with different settings."""
    lengths: dict[tuple[str, int], Length] = {}
    found: dict[tuple[str, int], States] = {}
    plans, bad = [], []
    for file in files:
        rows, wrong = read_lengths(file)
        lengths |= {row.key: row for row in rows if row.tokens > 0}
        bad += wrong + [f"{file}: a text of no tokens" for row in rows if not row.tokens]
        plans.append(_plan(plan_path(file)))
        if states:
            if not states_path(file).exists():
                raise PredictError(f"{file} has no hidden states beside it: collect with --layers")
            found |= read_states(states_path(file))
    if not lengths:
        raise PredictError(f"no lengths in {', '.join(map(str, files))}: collect some first")
    if different := [file for file, plan in zip(files, plans, strict=True) if plan != plans[0]]:
        raise PredictError(f"{different[0]} was written in another way than {files[0]}: give files of one collection")
    kept = [row for key, row in lengths.items() if not states or key in found]
    if not kept:
        raise PredictError("none of the texts has hidden states: collect with --layers")
    return Texts(kept, found, plans[0], bad)


def _plan(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PredictError(f"{path} cannot be read: {error}") from None
    return row if isinstance(row, dict) else {}


def place(key: str, seed: int) -> float:
    """Position of a prompt in the split, 0 to 1. It depends only on the key and the seed, not on the file."""
    return float(xxhash.xxh3_64_intdigest(f"{seed} {key}".encode()) / 2**64)


def is_held_out(length: Length, seed: int) -> bool:
    """Whether the prompt of this text belongs to the held-out part."""
    return place(prompt_key(length.prompt), seed) < HELD_OUT


@dataclass(frozen=True)
class Rows:
    """Training examples, one per row.

    features  float32 [n, inputs]; empty if they are not computed yet
    tokens    output tokens that follow
    open      whether the text was cut off, so that `tokens` is a lower bound
    fold      part of the examples; the same for all rows of one prompt
    weight    weight in the loss
    known     output tokens known so far; 0 at the prompt's end
    """

    features: Array
    tokens: Ints
    open: npt.NDArray[np.bool_]
    fold: Ints
    weight: Array
    known: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    def chosen(self, which: npt.NDArray[np.bool_]) -> Rows:
        """The rows where the mask `which` is true."""
        return Rows(*(column[which] if len(column) else column for column in vars(self).values()))


def folds_of(lengths: Sequence[Length], seed: int) -> Ints:
    """The fold of each text; folds have nearly the same number of prompts."""
    keys = [prompt_key(length.prompt) for length in lengths]
    order = sorted(set(keys), key=lambda key: place(key, seed))
    fold = {key: number % FOLDS for number, key in enumerate(order)}
    return np.array([fold[key] for key in keys])


def weights_of(lengths: Sequence[Length]) -> Array:
    """The weight of each text: 1 / (texts of its prompt), so that all prompts count the same."""
    counts = Counter(length.prompt for length in lengths)
    return np.array([1.0 / counts[length.prompt] for length in lengths], np.float32)


def state_rows(texts: Texts, lengths: Sequence[Length], layer: int, seed: int) -> Rows:
    """Rows for every kept position of these texts. The features are the hidden states after `layer` layers, float32
    [n, hidden]. Raises PredictError when the layer was not kept."""
    folds, weights = folds_of(lengths, seed), weights_of(lengths)
    states, rows = [], []
    for number, known, state in positions(texts, lengths, layer):
        length = lengths[number]
        states.append(state)
        rows.append((length.tokens - known, length.ended == "length", folds[number], weights[number], known))
    tokens, cuts, fold_, weight_, known_ = (np.array(column) for column in zip(*rows, strict=True))
    return Rows(np.array(states, np.float32), tokens, cuts, fold_, weight_.astype(np.float32), known_)


def positions(texts: Texts, lengths: Sequence[Length], layer: int) -> Iterator[tuple[int, int, Any]]:
    """Yield (index into `lengths`, known output tokens, hidden state after `layer` layers) of every kept position with
    tokens to follow. Raises PredictError when the layer was not kept."""
    if layer not in texts.layers:
        layers = ", ".join(map(str, texts.layers)) or "none"
        raise PredictError(f"layer {layer} was not kept when the lengths were collected, but {layers} were")
    at = texts.layers.index(layer)
    for number, length in enumerate(lengths):
        kept = texts.states[length.key]
        for known, row in zip(kept.outputs, kept.rows, strict=True):
            if known < length.tokens:
                yield number, known, row[at]
