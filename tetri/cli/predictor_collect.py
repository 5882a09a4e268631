"""tetri-cli predictor collect: collects the output lengths of a model."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetri import terminal
from tetri.cli.options import COUNT, examples, json_option
from tetri.cli.predictor_scores import report_bad
from tetri.paths import FILE, OUT_FILE

if TYPE_CHECKING:
    from tetri.predict.collect import Collected, CollectPlan, TextTask, TextWriter
    from tetri.predict.lengths import Length, Prompt
    from tetri.text import Tokenizer

LAYERS = (1 / 3, 16 / 30, 22 / 30)  # default layers, as shares of the model's depth: 10, 16 and 22 of 30
REPORT_S = 10.0  # between two lines of progress
_EXAMPLES = examples("tetri-cli predictor collect --prompts prompts.jsonl --model smollm2-135m --out lengths.jsonl")


@click.command("collect", epilog=_EXAMPLES)
@click.option("--prompts", type=FILE, required=True, help='JSONL, {"prompt": TEXT} per line; "source" is kept.')
@click.option("--model", required=True, metavar="NAME|FOLDER", help="Model whose output lengths are collected.")
@click.option("--out", type=OUT_FILE, required=True, help="File of lengths. An interrupted run is resumed.")
@click.option("--samples", type=COUNT, default=1, show_default=True, help="Texts per prompt.")
@click.option("--limit", type=COUNT, metavar="N", help="Use the first N usable prompts only.")
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.7, show_default=True)
@click.option("--max-tokens", type=COUNT, default=1024, show_default=True, help="Maximum output tokens.")
@click.option(
    "--batch", type=click.IntRange(1, 1023), default=64, show_default=True, help="Texts written at the same time."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the sampling.")
@click.option("--layers", metavar="N,N|none", help="Keep the hidden states after these layers (default: three layers).")
@click.option("--every", type=COUNT, default=64, show_default=True, help="Output tokens between two states.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--kv-mib", type=COUNT, default=3072, show_default=True, help="Size of the KV cache, in MiB.")
@click.option("--cpus", help='CPUs to run on, such as "0" or "0-1" (default: all).')
@json_option
def command(prompts: Path, out: Path, samples: int, limit: int | None, batch: int, as_json: bool, **how: Any) -> None:
    """Run prompts through a model, in its chat template, and record the number of output tokens of each, with hidden
    states. `predictor train` learns from these files. Lines that cannot be used are reported and skipped."""
    from tetri.predict.collect import Collected
    from tetri.predict.lengths import PredictError

    if how["cpus"] is not None:
        from tetri.proc.cpus import pin

        pin(how["cpus"])
    target = _target(how)
    try:
        asked = _asked(prompts, limit, samples, target)
        with Collected(out, target.plan) as collected:
            summary = _run(asked, collected, target, batch)
    except PredictError as error:
        raise click.ClickException(str(error)) from None
    made = {"out": str(out), **summary}
    terminal.print_json(made) if as_json else click.echo(_shown(made))
    if made["left"]:
        terminal.tell(f"interrupted: all that is written stays in {out}; the same command goes on from there")
        click.get_current_context().exit(130)


@dataclass(frozen=True)
class Target:
    """The model to collect from, and how. `kv_mib`: size of the KV cache in MiB."""

    folder: Path
    tokenizer: Tokenizer
    plan: CollectPlan
    kv_mib: int

    @property
    def context(self) -> int:
        """The model's context, in tokens."""
        from tetri.models import shape

        return shape(self.folder)[0]


@dataclass(frozen=True)
class Asked:
    """The prompts to run. `bad`: number of lines that cannot be used. `longest`: tokens of the longest prompt."""

    prompts: Sequence[Prompt]
    samples: int
    bad: int
    longest: int


def _target(how: dict[str, Any]) -> Target:
    from tetri.models import find, weights_hash
    from tetri.predict.collect import CollectPlan
    from tetri.text import TextError, load_tokenizer

    folder = find(how["model"])
    try:
        tokenizer = load_tokenizer(folder)
    except TextError as error:
        raise click.UsageError(str(error)) from None
    same = {name: how[name] for name in ("model", "temperature", "max_tokens", "seed", "every", "dtype")}
    plan = CollectPlan(weights=weights_hash(folder), layers=_layers(how["layers"], folder), **same)
    return Target(folder, tokenizer, plan, how["kv_mib"])


def _layers(text: str | None, folder: Path) -> tuple[int, ...]:
    if text == "none":
        return ()
    depth = _depth(folder)
    if text is None:
        return tuple(sorted({max(1, round(share * depth)) for share in LAYERS}))
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise click.UsageError(f"--layers takes numbers such as 10,16,22, or none, not {text!r}") from None
    if not 1 <= layers[0] <= layers[-1] <= depth:
        raise click.UsageError(f"--layers {text}: the model has layers 1 to {depth}")
    return layers


def _depth(folder: Path) -> int:
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        raise click.UsageError(f"{folder}/config.json does not tell num_hidden_layers: give --layers none") from None


def _asked(path: Path, limit: int | None, samples: int, target: Target) -> Asked:
    """Read the prompts, and report those that cannot be used. Raises PredictError."""
    from tetri.predict.collect import fitting
    from tetri.predict.lengths import PredictError, read_prompts

    prompt_limit = target.context - target.plan.max_tokens
    if prompt_limit < 1:
        raise PredictError(f"--max-tokens leaves no room for a prompt: the model's context is {target.context} tokens")
    found, bad = read_prompts(path)
    fit, unfit, longest = fitting(found, target.tokenizer.chat, prompt_limit, limit)
    problems = [*bad, *(f"{path}: {line}" for line in unfit)]
    report_bad(problems)
    if not fit:
        raise PredictError(f"{path} has no prompt that can be used")
    return Asked(fit, samples, len(problems), longest)


def _run(asked: Asked, collected: Collected, target: Target, batch: int) -> dict[str, Any]:
    """Collect the missing texts. Returns the summary of the whole file."""
    from tetri.predict.collect import collect, tasks_of

    if collected.again:
        terminal.tell(f"{collected.again} texts are written again: their hidden states are missing")
    tasks = tasks_of(asked.prompts, asked.samples, collected.done)
    wanted = len(asked.prompts) * asked.samples
    written: list[Length] = []
    began = ended = time.perf_counter()
    if tasks:
        terminal.tell(f"{wanted - len(tasks)} of {wanted} texts are there; starting vLLM")
        with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
            writer = _writer(target, batch, asked.longest, stack)
            began = time.perf_counter()
            advance = stack.enter_context(_progress(len(tasks)))

            def count(made: Length) -> None:
                written.append(made)
                advance(made.tokens)

            collect(tasks, target.plan, collected, writer, target.tokenizer.chat, batch, count)
        ended = time.perf_counter()
    left = tasks_of(asked.prompts, asked.samples, collected.done)
    return _summary(asked, collected, written, left, ended - began)


def _summary(
    asked: Asked, collected: Collected, written: Sequence[Length], left: Sequence[TextTask], seconds: float
) -> dict[str, Any]:
    tokens = sum(made.tokens for made in written)
    lengths = [made.tokens for made in collected.done.values()]
    return {
        "prompts": len(asked.prompts),
        "skipped": asked.bad,
        "texts": len(lengths),
        "written": len(written),
        "left": len(left),
        "tokens": tokens,
        "seconds": seconds,
        "mean": sum(lengths) / len(lengths) if lengths else None,
        "cut": sum(made.ended == "length" for made in collected.done.values()),
    }


def _shown(made: dict[str, Any]) -> str:
    lines = [f"{made['out']}: {made['texts']} texts, {made['written']} of them new; {made['skipped']} lines skipped"]
    if made["texts"]:
        lines.append(f"{made['mean']:.0f} tokens on average; {made['cut']} were cut off by --max-tokens")
    if made["written"]:
        rate = made["tokens"] / made["seconds"]
        lines.append(f"{made['tokens']} tokens in {made['seconds']:.0f} s, {rate:.0f} tokens/s")
    if made["left"]:
        lines.append(f"{made['left']} texts are left: what is there has too many short ones to train on")
    return "\n".join(lines)


def _writer(target: Target, batch: int, longest: int, stack: contextlib.ExitStack) -> TextWriter:
    """Start vLLM; `stack` closes it."""
    from tetri.engine.base import EngineError
    from tetri.engine.vllm.writer import Writer

    plan = target.plan
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # vLLM logs to stdout
    try:
        writer = Writer(
            target.folder,
            dtype=plan.dtype,
            batch=batch,
            context=longest + plan.max_tokens,
            kv_bytes=target.kv_mib << 20,
            layers=plan.layers,
            every=plan.every,
        )
    except EngineError as error:
        raise click.ClickException(str(error)) from None
    stack.callback(writer.close)
    gc.collect()
    gc.freeze()  # spares the collector vLLM's million objects
    return writer


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the tokens of each text: a bar on a terminal's stderr, else a line every REPORT_S."""
    began = reported_at = time.monotonic()
    texts = tokens = 0

    def text() -> str:
        spent = time.monotonic() - began
        return f"{tokens / spent if spent else 0:.0f} tokens/s, {time_left(texts, total, spent)}"

    if not sys.stderr.isatty():

        def report(count: int) -> None:
            nonlocal texts, tokens, reported_at
            texts, tokens = texts + 1, tokens + count
            if texts == total or time.monotonic() - reported_at >= REPORT_S:
                reported_at = time.monotonic()
                terminal.tell(f"{texts} of {total} texts, {text()}")

        yield report
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("collecting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, text="")

        def show(count: int) -> None:
            nonlocal texts, tokens
            texts, tokens = texts + 1, tokens + count
            bar.update(task, completed=texts, text=text())

        yield show


def time_left(texts: int, total: int, spent_s: float) -> str:
    """The estimated time left, in words."""
    left = spent_s / texts * (total - texts) if texts else 0.0
    if left < 90:
        return f"{left:.0f} s left"
    return f"{left / 60:.0f} min left" if left < 5400 else f"{left / 3600:.1f} h left"
