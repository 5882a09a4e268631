"""Runs prompts through the target model and writes down how many tokens it answers with (paper, section 3.3.2)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import xxhash

from tetri.predict.lengths import (
    Length,
    PredictError,
    Prompt,
    States,
    pack_states,
    read_lengths,
    states_path,
    whole_records,
)
from tetri.request import Sampling, Turn


@dataclass(frozen=True)
class Plan:
    """How texts are written; kept beside the lengths, as FILE.json, so that no file is continued another way.
    `weights`: the hash of the model's. `layers`, `every`: which hidden states are kept, see engine/vllm_writer.py."""

    model: str
    weights: str
    temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0
    layers: tuple[int, ...] = ()
    every: int = 64


class Texts(Protocol):
    """What writes texts: engine/vllm_writer.py."""

    context: int

    def __len__(self) -> int: ...

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling) -> None: ...

    def step(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Job:
    prompt: Prompt
    sample: int

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt.key, self.sample


def jobs_of(prompts: Sequence[Prompt], samples: int, lengths: Path) -> list[Job]:
    """What is still to be written: the first text of every prompt, then the second of every one, and so on. Raises
    PredictError."""
    done = {length.key for length in read_lengths(lengths)[0]} if lengths.exists() else set[tuple[str, int]]()
    wanted = [Job(prompt, sample) for sample in range(samples) for prompt in prompts]
    return [job for job in wanted if job.key not in done]


def check_plan(plan: Plan, lengths: Path) -> None:
    """Whether the file, if it is there, was begun this way. Raises PredictError."""
    path = plan_path(lengths)
    now = json.loads(json.dumps(asdict(plan)))
    if not lengths.exists() and not path.exists():
        _write(path, json.dumps(now, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PredictError(f"{lengths} was not begun by collect, it has no {path.name}: give another --out") from None
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        told = ", ".join(f"{name} {before.get(name)}" for name in different)
        raise PredictError(f"{lengths} was begun with {told}: give the same, or another --out")


def plan_path(lengths: Path) -> Path:
    return lengths.with_name(f"{lengths.name}.json")


def collect(
    jobs: Sequence[Job],
    plan: Plan,
    lengths: Path,
    writer: Texts,
    chat: Callable[[Sequence[Turn]], list[int]],
    batch: int,
    progress: Callable[[Job, Length | str], None],
) -> None:
    """Write the texts of `jobs`, `batch` at a time. Every length is in the file as soon as it is known. `progress`
    hears of each job its length, or why it was skipped. Raises OSError when a file cannot be written."""
    waiting = list(reversed(jobs))
    under_way: dict[str, tuple[Job, int]] = {}
    with ExitStack() as files:
        out = files.enter_context(_appended(lengths, _whole_lines))
        states = files.enter_context(_appended(states_path(lengths), whole_records)) if plan.layers else None
        while waiting or under_way:
            while waiting and len(under_way) < batch:
                job = waiting.pop()
                prompt = chat([Turn(role="user", content=job.prompt.text)])
                if len(prompt) + plan.max_tokens > writer.context:
                    progress(job, f"{len(prompt)} prompt tokens leave no room for {plan.max_tokens} of output")
                    continue
                key = f"{job.prompt.key}-{job.sample}"
                writer.add(key, prompt, sampling_of(job, plan))
                under_way[key] = job, len(prompt)
            for text in writer.step() if under_way else ():
                job, count = under_way.pop(text.key)
                made = Length(job.prompt.text, len(text.ids), job.sample, text.reason, count, job.prompt.source)
                if states is not None:  # before its line: a line says that all of it is there
                    rows = np.stack(list(text.states.values()))
                    states.write(pack_states(States(job.key, tuple(text.states), rows)))
                    states.flush()
                out.write(json.dumps(_row(made), ensure_ascii=False).encode() + b"\n")
                out.flush()
                progress(job, made)


def sampling_of(job: Job, plan: Plan) -> Sampling:
    """Each text has a seed of its own, that depends on nothing but the prompt and the sample's number."""
    seed = xxhash.xxh3_64_intdigest(f"{plan.seed} {job.sample} {job.prompt.key}".encode()) >> 1
    return Sampling(max_tokens=plan.max_tokens, temperature=plan.temperature, seed=seed)


def _row(length: Length) -> dict[str, Any]:
    return {name: value for name, value in asdict(length).items() if value != "" or name == "prompt"}


def _appended(path: Path, sound: Callable[[Path], int]) -> BinaryIO:
    """Opened for appending, behind its sound part: a run that was killed may have left half a line or record."""
    file = path.open("ab")
    file.truncate(sound(path))
    return file


def _whole_lines(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
