"""The files of the predictor: prompts, the lengths that a model really wrote, the hidden states on the way.

prompts   JSONL, an object with `prompt` a line; `source`, where it is there, is kept; others are ignored
lengths   JSONL, an object with `prompt` and `tokens` a line, as `collect` writes them with more beside it
states    next to a file of lengths, as FILE.states: MessagePack records, appended
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import xxhash

MOST_PROMPT_CHARS = 1 << 20


class PredictError(ValueError):
    """A file that cannot be used, or a predictor that cannot be made; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    source: str = ""

    @property
    def key(self) -> str:
        return prompt_key(self.text)


@dataclass(frozen=True, slots=True)
class Length:
    """What a model wrote after a prompt: `tokens` output tokens, the end of sequence included, cut off by the limit
    where `ended` is "length". `sample` counts the texts of one prompt; `prompt_tokens` is 0 where nobody counted."""

    prompt: str
    tokens: int
    sample: int = 0
    ended: str = "stop"
    prompt_tokens: int = 0
    source: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return prompt_key(self.prompt), self.sample


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of one text: `outputs[i]` tokens were known when row i, [layers, hidden] float16, was taken."""

    key: tuple[str, int]
    outputs: tuple[int, ...]
    rows: Any = field(repr=False)


def prompt_key(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))


def read_prompts(path: Path) -> tuple[list[Prompt], list[str]]:
    """The prompts, each once, and what is wrong with the other lines, one line each."""
    found: dict[str, Prompt] = {}
    bad: list[str] = []
    for number, row, problem in _rows(path):
        text, source = row.get("prompt"), row.get("source")
        if not problem and not (isinstance(text, str) and text.strip() and len(text) <= MOST_PROMPT_CHARS):
            problem = f'"prompt" must be a text of 1 to {MOST_PROMPT_CHARS} characters'
        if problem or not isinstance(text, str):
            bad.append(f"{path}:{number}: {problem}")
            continue
        found.setdefault(text, Prompt(text, source if isinstance(source, str) else ""))
    return list(found.values()), bad


def read_lengths(path: Path) -> tuple[list[Length], list[str]]:
    """As `read_prompts`. Of two lines for the same sample of a prompt the later one counts."""
    found: dict[tuple[str, int], Length] = {}
    bad: list[str] = []
    for number, row, problem in _rows(path):
        length = None if problem else _length(row)
        if length is None:
            bad.append(
                f"{path}:{number}: {problem or 'an object with a text `prompt` and a number `tokens` is needed'}"
            )
        else:
            found[length.key] = length
    return list(found.values()), bad


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(line number, the object, what is wrong with the line or nothing). Raises PredictError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PredictError(f"{path}: {error.strerror or error}") from None
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not UTF-8, not JSON
            yield number, {}, "not JSON"
            continue
        yield number, row if isinstance(row, dict) else {}, "" if isinstance(row, dict) else "not an object"


def _length(row: dict[str, Any]) -> Length | None:
    counts = [row.get(name, 0) for name in ("tokens", "sample", "prompt_tokens")]
    words = [row.get("prompt"), row.get("ended", "stop"), row.get("source", "")]
    if "tokens" not in row or not all(type(count) is int and count >= 0 for count in counts):
        return None
    if not all(isinstance(word, str) for word in words) or words[1] not in ("stop", "length"):
        return None
    tokens, sample, prompt_tokens = counts
    prompt, ended, source = map(str, words)
    return Length(prompt, tokens, sample, ended, prompt_tokens, source)


def states_path(lengths: Path) -> Path:
    return lengths.with_name(f"{lengths.name}.states")


def pack_states(states: States) -> bytes:
    rows = np.ascontiguousarray(states.rows, dtype=np.float16)
    packed: bytes = msgpack.packb([*states.key, list(states.outputs), list(rows.shape[1:]), rows.tobytes()])
    return packed


def whole_records(path: Path) -> int:
    """Bytes of the states file up to the end of its last whole record."""
    end = 0
    with path.open("rb") as file:
        records = msgpack.Unpacker(file, max_buffer_size=1 << 31)
        for _ in records:
            end = records.tell()
    return end


def read_states(path: Path) -> dict[tuple[str, int], States]:
    """Of two records of one text the later one counts; a record that was cut off, the last one, is left out. Raises
    PredictError."""
    found: dict[tuple[str, int], States] = {}
    try:
        with path.open("rb") as file:
            for key, sample, outputs, shape, data in msgpack.Unpacker(file, max_buffer_size=1 << 31):
                rows = np.frombuffer(data, np.float16).reshape(len(outputs), *shape)
                found[key, sample] = States((key, sample), tuple(outputs), rows)
    except OSError as error:
        raise PredictError(f"{path}: {error.strerror or error}") from None
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise PredictError(f"{path}: not a file of hidden states ({type(error).__name__}): collect again") from None
    return found
