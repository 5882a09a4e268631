"""The predictor's data files: prompts, the output lengths that a model wrote, and hidden states.

prompts   JSONL, one object with `prompt` per line; an optional `source` is kept; other fields are ignored
lengths   JSONL, one object with `prompt` and `tokens` per line; `collect` writes further fields
states    FILE.states beside a file of lengths: MessagePack records, one after the other
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import xxhash

MOST_PROMPT_CHARS = 1 << 20
LARGEST_STATE = float(np.finfo(np.float16).max)
_LARGEST_RECORD = 1 << 31  # bytes of the hidden states of one text


class PredictError(ValueError):
    """A file cannot be used, or a predictor cannot be made. The message is one line and tells what to do."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt. `line`: its first line number in its file; 0 if it does not come from a file."""

    text: str
    source: str = ""
    line: int = 0

    @property
    def key(self) -> str:
        """Hash of the text; see prompt_key."""
        return prompt_key(self.text)


@dataclass(frozen=True, slots=True)
class Length:
    """The length of one text that a model wrote after a prompt.

    tokens         output tokens, the end-of-sequence token included
    sample         number of the text among the texts of its prompt, from 0
    ended          "stop", or "length" if the text was cut off at the limit
    prompt_tokens  0 if unknown
    """

    prompt: str
    tokens: int
    sample: int = 0
    ended: str = "stop"
    prompt_tokens: int = 0
    source: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """(prompt key, sample): identifies the text in all files."""
        return prompt_key(self.prompt), self.sample


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of one text: `rows` float16 [n, layers, hidden]; row i belongs to `outputs[i]` known output
    tokens."""

    key: tuple[str, int]
    outputs: tuple[int, ...]
    rows: Any = field(repr=False)


def prompt_key(text: str) -> str:
    """Hash of a prompt's text, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))


def read_prompts(path: Path) -> tuple[list[Prompt], list[str]]:
    """(distinct prompts, one line for each line of the file that cannot be used). Raises PredictError."""
    found: dict[str, Prompt] = {}
    bad: list[str] = []
    for number, row, problem in _rows(path):
        text, source = row.get("prompt"), row.get("source", "")
        problem = problem or _prompt_problem(text)
        if problem or not isinstance(text, str):
            bad.append(f"{path}:{number}: {problem}")
            continue
        found.setdefault(text, Prompt(text, source if _is_text(source) else "", number))
    return list(found.values()), bad


def read_lengths(path: Path) -> tuple[list[Length], list[str]]:
    """(lengths, one line for each line of the file that cannot be used). Raises PredictError.

    A line without `sample` gets the next number of its prompt; of two lines with the same sample, the later one counts.
    """
    found: dict[tuple[str, int], Length] = {}
    bad: list[str] = []
    unnumbered: Counter[str] = Counter()
    for number, row, problem in _rows(path):
        if not problem and "sample" not in row and isinstance(text := row.get("prompt"), str):
            row["sample"] = unnumbered[text]
            unnumbered[text] += 1
        length = None if problem else _length(row)
        if length is None:
            needed = "an object with a text `prompt` and a number `tokens` is needed"
            bad.append(f"{path}:{number}: {problem or needed}")
        else:
            found[length.key] = length
    return list(found.values()), bad


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield (line number, object, error or ""). Raises PredictError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
                    yield number, {}, "not JSON"
                    continue
                yield number, row if isinstance(row, dict) else {}, "" if isinstance(row, dict) else "not an object"
    except OSError as error:
        raise PredictError(f"{path}: {error.strerror or error}") from None


def _prompt_problem(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        return 'it needs a text "prompt"'
    if len(text) > MOST_PROMPT_CHARS:
        return f'"prompt" has {len(text)} characters: {MOST_PROMPT_CHARS} are allowed'
    return "" if _is_text(text) else '"prompt" is no text: it contains half a surrogate pair'


def _is_text(value: Any) -> bool:
    """Whether the value is text that UTF-8 can encode: JSON can spell half a surrogate pair, which UTF-8 cannot."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in set(value))


def _length(row: dict[str, Any]) -> Length | None:
    counts = [row.get(name, 0) for name in ("tokens", "sample", "prompt_tokens")]
    values = [row.get("prompt"), row.get("ended", "stop"), row.get("source", "")]
    if "tokens" not in row or not all(type(count) is int and count >= 0 for count in counts):
        return None
    if not all(map(_is_text, values)) or values[1] not in ("stop", "length"):
        return None
    tokens, sample, prompt_tokens = counts
    prompt, ended, source = map(str, values)
    return Length(prompt, tokens, sample, ended, prompt_tokens, source)


def states_path(lengths: Path) -> Path:
    """Path of the hidden states beside a file of lengths."""
    return lengths.with_name(f"{lengths.name}.states")


def pack_states(states: States) -> bytes:
    """One record of a states file. Values beyond the range of float16 are clipped."""
    rows = np.clip(states.rows, -LARGEST_STATE, LARGEST_STATE).astype(np.float16)  # some models have larger outliers
    packed: bytes = msgpack.packb([*states.key, list(states.outputs), list(rows.shape[1:]), rows.tobytes()])
    return packed


def read_states(path: Path) -> dict[tuple[str, int], States]:
    """Read a states file. Of two records of one text, the later one counts; an incomplete last record is ignored.

    Raises PredictError."""
    try:
        return {states.key: states for states, _ in records(path)}
    except OSError as error:
        raise PredictError(f"{path}: {error.strerror or error}") from None


def records(path: Path) -> Iterator[tuple[States, int]]:
    """Yield the records of a states file, each with the file offset of its end. Raises OSError, and PredictError where
    the file is damaged."""
    try:
        with path.open("rb") as file:
            found = msgpack.Unpacker(file, max_buffer_size=_LARGEST_RECORD)
            for key, sample, outputs, shape, data in found:
                rows = np.frombuffer(data, np.float16).reshape(len(outputs), *shape)
                yield States((key, sample), tuple(outputs), rows), found.tell()
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise PredictError(f"{path}: not a file of hidden states ({type(error).__name__}): collect again") from None
