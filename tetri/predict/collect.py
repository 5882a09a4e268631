"""Runs prompts through the target model and records how many tokens it writes (paper, section 3.3.2)."""

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
from typing import Any, Protocol

import numpy as np
import xxhash

from tetri import atomic
from tetri.predict.lengths import Length, PredictError, Prompt, States, pack_states, read_lengths, records, states_path
from tetri.request import Sampling, Turn
from tetri.text import TextError

Key = tuple[str, int]


@dataclass(frozen=True)
class CollectPlan:
    """The settings of a collection. Stored beside the lengths as FILE.json: a resumed run must use the same ones.

    `model` is the model's name, `weights` the hash of its weights. `layers` and `every` select the hidden states to
    keep, see engine/vllm/writer.py."""

    model: str
    weights: str
    temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0
    layers: tuple[int, ...] = ()
    every: int = 64
    dtype: str = "bfloat16"

    def described(self) -> dict[str, Any]:
        """The settings that determine the texts. They must not change within a file."""
        return {name: value for name, value in asdict(self).items() if name != "model"}


class TextWriter(Protocol):
    """Writes texts with the target model (engine/vllm/writer.py). Its length is the number of unfinished texts."""

    context: int

    def __len__(self) -> int: ...

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling) -> None:
        """Begin a text. `key` identifies it in the results of `step`."""

    def step(self) -> Sequence[Any]:
        """Run one forward pass. Returns the texts that it has ended."""


@dataclass(frozen=True)
class TextTask:
    """One text to write: sample number `sample` of `prompt`."""

    prompt: Prompt
    sample: int

    @property
    def key(self) -> Key:
        """(prompt key, sample): identifies the text in all files."""
        return self.prompt.key, self.sample


Chat = Callable[[Sequence[Turn]], list[int]]


def fitting(
    prompts: Sequence[Prompt], chat: Chat, prompt_limit: int, most: int | None = None
) -> tuple[list[Prompt], list[str], int]:
    """Select the first `most` prompts that have at most `prompt_limit` tokens in the model's chat template.

    Returns (prompts, one line for each prompt that was skipped, tokens of the longest prompt). Raises PredictError when
    the model cannot encode even a trivial prompt."""
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
    """Token ids of the prompt in the chat template. Raises TextError."""
    return chat([Turn(role="user", content=prompt.text)])


def tasks_of(prompts: Sequence[Prompt], samples: int, done: Mapping[Key, Length]) -> list[TextTask]:
    """The texts that are not `done`: first sample 0 of every prompt, then sample 1 of every prompt, and so on."""
    wanted = [TextTask(prompt, sample) for sample in range(samples) for prompt in prompts]
    return [task for task in wanted if task.key not in done]


class Collected:
    """A file of lengths with its hidden states and its plan, locked by this process until `close`.

    `done` has the complete texts of earlier runs. Opening the file truncates half a line or half a record, which a
    killed run leaves behind. `again` counts the lines whose states are missing; these texts are written again.

    `add` writes the states before the length, and both before it returns, but does not sync to disk: after a power
    failure, the last texts are written again. Raises OSError, and PredictError when another process holds the file or
    when the file has other settings."""

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
        """Open the states file, cut it after its last complete record, and return the number of states of each text."""
        path = states_path(self._lengths)
        kept: dict[Key, int] = {}
        end = 0
        if path.exists() and self._began:
            with suppress(PredictError):  # a damaged record hides all records behind it
                for states, end in records(path):  # noqa: B007  used after the loop
                    kept[states.key] = len(states.outputs)
        self._states = opened.enter_context(path.open("ab", buffering=0))
        self._states.truncate(end)
        return kept

    def add(self, made: Length, states: Mapping[int, Any]) -> None:
        """Append a length and its `states` (engine/vllm/writer.py). Raises OSError; call only `close` after it."""
        if not self._began:
            atomic.write_text(plan_path(self._lengths), json.dumps(asdict(self._plan), indent=1) + "\n")
            self._began = True
        if self._states is not None:  # before the length: a length means that its states are complete
            packed = pack_states(States(made.key, tuple(states), np.stack(list(states.values()))))
            _append(self._states, packed, states_path(self._lengths))
        row = {name: value for name, value in asdict(made).items() if value != ""}
        _append(self._out, json.dumps(row, ensure_ascii=False).encode() + b"\n", self._lengths)
        self.done[made.key] = made

    def close(self) -> None:
        """Close the files and release the lock."""
        self._files.close()

    def __enter__(self) -> Collected:
        return self

    def __exit__(self, *error: object) -> None:
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
    """Write the texts of `tasks`, at most `batch` at a time; their prompts have passed `fitting`. Calls `progress` for
    each length in the file. Raises OSError when a file cannot be written.

    Train only on a complete run: an unfinished run has too few long texts, because these take longer to write."""
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
    """Sampling of one text. Its seed depends only on the plan's seed, the prompt and the sample number."""
    seed = xxhash.xxh3_64_intdigest(f"{plan.seed} {task.sample} {task.prompt.key}".encode()) >> 1
    return Sampling(max_tokens=plan.max_tokens, temperature=plan.temperature, seed=seed)


def plan_path(lengths: Path) -> Path:
    """Path of the plan beside a file of lengths."""
    return lengths.with_name(f"{lengths.name}.json")


def read_plan(lengths: Path) -> CollectPlan | None:
    """The plan of the file `lengths`; None when it is missing or cannot be read."""
    try:
        found = json.loads(plan_path(lengths).read_bytes())
        known = {field.name: found[field.name] for field in fields(CollectPlan) if field.name in found}
        return CollectPlan(**{**known, "layers": tuple(known.get("layers", ()))})
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _check(plan: CollectPlan, lengths: Path) -> bool:
    """Whether the file has lengths of this plan; a run that ended before its first length does not count. Raises
    PredictError when the files belong to another plan or to another program."""
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
    """Append without a buffer, so that `close` does not retry a failed write. Raises an OSError that names `path`."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        advice = "the written part is kept; free some space and run the same command again"
        raise OSError(error.errno, f"{error.strerror}; {advice}", str(path)) from None
