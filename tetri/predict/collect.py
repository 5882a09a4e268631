"""Runs prompts through the target model and writes down how many tokens it answers with (paper, section 3.3.2)."""

from __future__ import annotations

import fcntl
import io
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import xxhash

from tetri import atomic
from tetri.predict.lengths import (
    Length,
    PredictError,
    Prompt,
    States,
    pack_states,
    read_lengths,
    records,
    states_path,
)
from tetri.request import Sampling, Turn
from tetri.text import TextError

Key = tuple[str, int]


@dataclass(frozen=True)
class CollectPlan:
    """How texts are written; kept beside the lengths, as FILE.json, so that no file is continued another way.
    `weights`: the hash of the model's; `model` is what it was called. `layers`, `every`: which hidden states are kept,
    see engine/vllm/writer.py."""

    model: str
    weights: str
    temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0
    layers: tuple[int, ...] = ()
    every: int = 64
    dtype: str = "bfloat16"

    def described(self) -> dict[str, Any]:
        """What decides over the texts, and may not change within a file."""
        return {name: value for name, value in asdict(self).items() if name != "model"}


class TextWriter(Protocol):
    """What writes texts: engine/vllm/writer.py."""

    context: int

    def __len__(self) -> int: ...

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling) -> None: ...

    def step(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class TextTask:
    prompt: Prompt
    sample: int

    @property
    def key(self) -> Key:
        return self.prompt.key, self.sample


Chat = Callable[[Sequence[Turn]], list[int]]


def fitting(
    prompts: Sequence[Prompt], chat: Chat, prompt_limit: int, most: int | None = None
) -> tuple[list[Prompt], list[str], int]:
    """The first `most` prompts that the model takes, at most `buffer` tokens long in its chat template; why it does not
    take others before them, one line each; the tokens of the longest. Raises PredictError where it takes none at all.
    """
    try:
        ids_of(Prompt("hello"), chat)
    except TextError as error:
        raise PredictError(f"lengths cannot be collected from this model: {error}") from None
    good: list[Prompt] = []
    bad: list[str] = []
    longest = 0
    for prompt in prompts:
        if len(good) == most:
            break
        try:
            count = len(ids_of(prompt, chat))
        except TextError as error:
            bad.append(f"line {prompt.line}: {error}")
            continue
        if count > prompt_limit:
            bad.append(f"line {prompt.line}: {count} prompt tokens, the model's context leaves room for {prompt_limit}")
            continue
        good.append(prompt)
        longest = max(longest, count)
    return good, bad, longest


def ids_of(prompt: Prompt, chat: Chat) -> list[int]:
    """Raises TextError."""
    return chat([Turn(role="user", content=prompt.text)])


def tasks_of(prompts: Sequence[Prompt], samples: int, done: Mapping[Key, Length]) -> list[TextTask]:
    """What is still to be written: the first text of every prompt, then the second of every one, and so on."""
    wanted = [TextTask(prompt, sample) for sample in range(samples) for prompt in prompts]
    return [task for task in wanted if task.key not in done]


class Collected:
    """A file of lengths with its states and its plan, held by this process alone until `close`. `done`: what was there
    already, sound and whole; a run that was killed may have left half a line or record, which is cut off, or a line
    whose states never came onto the disk, which does not count (`again`: how many of these).

    A length is in its file as soon as `add` returns, behind its states. When they reach the disk is the system's
    affair: of a power failure, the worst is that the last texts are written again. Raises PredictError for a file that
    another process holds or that was begun another way, and OSError."""

    def __init__(self, lengths: Path, plan: CollectPlan) -> None:
        self._lengths, self._plan = lengths, plan
        if lengths.exists() and not lengths.is_file():
            raise PredictError(f"{lengths} is no file: give another --out")
        with ExitStack() as opened:
            self._out = opened.enter_context(lengths.open("ab", buffering=0))
            _lock(self._out, lengths)
            self._began = _check(plan, lengths)
            self._out.truncate(_whole_lines(self._out))
            self._states: io.FileIO | None = None
            kept = self._resumed_states(opened) if plan.layers else None
            found = read_lengths(lengths)[0]
            whole = (one for one in found if kept is None or kept.get(one.key) == -(-one.tokens // plan.every))
            self.done: dict[Key, Length] = {one.key: one for one in whole}
            self.again = len(found) - len(self.done)
            self._files = opened.pop_all()

    def _resumed_states(self, opened: ExitStack) -> dict[Key, int]:
        """How many states of each text are there, the sound part of the file."""
        path = states_path(self._lengths)
        kept: dict[Key, int] = {}
        end = 0
        if path.exists() and self._began:
            with suppress(PredictError):  # what a power failure left: nothing behind it can be found
                for states, end in records(path):  # noqa: B007  the last end is wanted
                    kept[states.key] = len(states.outputs)
        self._states = opened.enter_context(path.open("ab", buffering=0))
        self._states.truncate(end)
        return kept

    def add(self, made: Length, states: Mapping[int, Any]) -> None:
        """`states` as of engine/vllm/writer.py. Raises OSError, after which there is nothing to do but to close."""
        if not self._began:
            atomic.write_text(plan_path(self._lengths), json.dumps(asdict(self._plan), indent=1) + "\n")
            self._began = True
        if self._states is not None:  # before its line: a line says that all of it is there
            packed = pack_states(States(made.key, tuple(states), np.stack(list(states.values()))))
            _append(self._states, packed, states_path(self._lengths))
        row = {name: value for name, value in asdict(made).items() if value != ""}
        _append(self._out, json.dumps(row, ensure_ascii=False).encode() + b"\n", self._lengths)
        self.done[made.key] = made

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Collected:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def collect(
    tasks: Sequence[TextTask],
    plan: CollectPlan,
    collected: Collected,
    writer: TextWriter,
    chat: Chat,
    batch: int,
    progress: Callable[[Length], None],
) -> None:
    """Write the texts of `requests`, whose prompts are `fitting`, `batch` at a time. `progress` hears of each length when
    it is in the file. Raises OSError when a file cannot be written.

    Whoever stops halfway has more of the short texts than of the long ones, which are under way longer: lengths are
    fit for training when all jobs are done."""
    waiting = list(reversed(tasks))
    under_way: dict[str, tuple[TextTask, int]] = {}
    while waiting or under_way:
        while waiting and len(under_way) < batch:
            task = waiting.pop()
            ids = ids_of(task.prompt, chat)
            key = f"{task.prompt.key}-{task.sample}"
            writer.add(key, ids, sampling_of(task, plan))
            under_way[key] = task, len(ids)
        for text in writer.step():
            task, count = under_way.pop(text.key)
            made = Length(task.prompt.text, len(text.ids), task.sample, text.reason, count, task.prompt.source)
            collected.add(made, text.states)
            progress(made)


def sampling_of(task: TextTask, plan: CollectPlan) -> Sampling:
    """Each text has a seed of its own, that depends on nothing but the prompt and the sample's number."""
    seed = xxhash.xxh3_64_intdigest(f"{plan.seed} {task.sample} {task.prompt.key}".encode()) >> 1
    return Sampling(max_tokens=plan.max_tokens, temperature=plan.temperature, seed=seed)


def plan_path(lengths: Path) -> Path:
    return lengths.with_name(f"{lengths.name}.json")


def read_plan(lengths: Path) -> CollectPlan | None:
    """With which `lengths` was begun; None where that cannot be known."""
    try:
        found = json.loads(plan_path(lengths).read_bytes())
        known = {field.name: found[field.name] for field in fields(CollectPlan) if field.name in found}
        return CollectPlan(**{**known, "layers": tuple(known.get("layers", ()))})
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _check(plan: CollectPlan, lengths: Path) -> bool:
    """Whether the file was begun, and this way; a run that ended before its first length began nothing. Raises
    PredictError."""
    before = read_plan(lengths)
    if before is None:
        for path in (lengths, plan_path(lengths), states_path(lengths)):
            if path.exists() and path.stat().st_size:
                raise PredictError(f"{path} is there and was not begun by collect: give another --out")
        return False
    was = before.described()
    different = [name for name, value in plan.described().items() if was[name] != value]
    if different and lengths.stat().st_size:
        described = ", ".join(f"{name} {_shown(was[name])}" for name in different)
        raise PredictError(f"{lengths} was begun with {described}: give the same, or another --out")
    return not different


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _lock(file: io.FileIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PredictError(f"another collect is writing {path}: wait for its end, or give another --out") from None


def _whole_lines(file: io.FileIO) -> int:
    """Bytes up to the end of the last whole line."""
    if not os.fstat(file.fileno()).st_size:
        return 0
    with open(file.name, "rb") as again, mmap.mmap(again.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.rfind(b"\n") + 1


def _append(file: io.FileIO, data: bytes, path: Path) -> None:
    """Not buffered: what could not be written is not tried again at the end. Raises OSError that names the file."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        advice = "what is written stays; make room, and the same command goes on"
        raise OSError(error.errno, f"{error.strerror}; {advice}", str(path)) from None
