"""bin/demo: start a cluster, send two prompts, show a table of times and stop the cluster.

Exit status 0: both prompts were answered, and no decode worker computed a prompt token again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tetri import terminal
from tetri.bench.deployment import EXPECTED, LOAD_S, REPOSITORY, SPLIT, own_folder, pinned, running
from tetri.bench.report import Program, one_line, progress
from tetri.client import Client, Result
from tetri.config import Config
from tetri.paths import FILE
from tetri.request import Stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LICENCE = REPOSITORY / "LICENSE"


@dataclass(frozen=True)
class Prompt:
    """A prompt of the demo. `shown` replaces the text in the output."""

    title: str
    shown: str
    text: str
    max_tokens: int
    chunks: int = 1  # the least number of KV chunks that it must take


def prompts() -> list[Prompt]:
    """Return the two prompts."""
    short = "Explain in two sentences why the sky is blue."
    sections = LICENCE.read_text(encoding="utf-8").partition("5. Submission")[0].rstrip()  # 1,400 tokens
    question = "What is this text about? Answer in one sentence."
    return [
        Prompt("short", short, short, 96),
        Prompt("long", f"(sections 1 to 4 of LICENSE) {question}", f"{sections}\n\n{question}", 64, chunks=2),
    ]


@click.command(cls=Program)
@click.option("--conf", type=FILE, help="Configuration file (default: conf/split.toml).")
def main(conf: Path | None) -> None:
    """Start a small cluster, send two prompts, show where the time went and stop the cluster."""
    from rich.console import Console

    console, status = Console(), 1
    try:
        with one_line("bin/demo", *EXPECTED), own_folder("demo") as folder:
            config = pinned(conf or SPLIT, folder, "demo", sorted(os.sched_getaffinity(0)))
            status = demonstrate(config, console)
    except KeyboardInterrupt:
        terminal.tell("bin/demo: interrupted; everything is stopped")
        status = 130
    sys.exit(status)


def demonstrate(config: Config, console: Console) -> int:
    """Run the demo and return the exit status. Raises the errors of EXPECTED."""
    for worker in config.workers:
        progress(f"{worker.iid}: {worker.role} worker on CPU {worker.cpus}")
    with running(config, progress, LOAD_S), Client(config.clients_address, timeout=60.0) as client:
        results = [_answer(client, prompt, console) for prompt in prompts()]
    progress("stopped")
    console.print(table([prompt.title for prompt in prompts()], results))
    answered = zip(prompts(), results, strict=True)
    found = [problem for prompt, result in answered for problem in problems(result, prompt.chunks)]
    for problem in found:
        terminal.tell(f"bin/demo: {problem}")
    return 1 if found else 0


def _answer(client: Client, prompt: Prompt, console: Console) -> Result:
    console.print(f"\n[bold]> {prompt.shown}[/]", highlight=False)
    with client.stream(messages=[{"role": "user", "content": prompt.text}], max_tokens=prompt.max_tokens) as answer:
        for piece in answer:
            terminal.show(piece)
    terminal.show("\n\n")
    assert answer.result is not None  # iterating raises if there is no result
    return answer.result


def problems(result: Result, chunks: int) -> list[str]:
    """Return what is wrong with the hand-over of this result, one line each."""
    receipt, found = result.receipt, []
    if not result.token_ids:
        found.append(f"request {result.rid} was not answered: {result.finish_reason}")
    if receipt.adopted is None or receipt.chunks is None:
        return [*found, f"request {result.rid}: no worker reported its KV"]
    if receipt.kept != receipt.prompt_tokens:
        found.append(f"request {result.rid}: {receipt.kept} of {receipt.prompt_tokens} prompt tokens were adopted")
    if receipt.recomputed:
        found.append(f"request {result.rid}: {receipt.recomputed} prompt tokens were computed again")
    if receipt.adopted and receipt.chunks < chunks:
        found.append(f"request {result.rid}: its KV came in {receipt.chunks} chunks, not in {chunks} or more")
    return found


def table(titles: Sequence[str], results: Sequence[Result]) -> Table:
    """Return the table of stages and KV figures, one column for each result."""
    from rich.table import Table

    shown = Table("", *titles, title="where the time went, and what moved")
    for column in shown.columns[1:]:
        column.justify = "right"
    columns = [_facts(result) for result in results]
    for name in columns[0]:
        last = name in ("decode", "tokens/s", "recomputed")  # row of a section
        shown.add_row(name, *(column[name] for column in columns), end_section=last)
    return shown


def _facts(result: Result) -> dict[str, str]:
    stages = [stage for stage in Stage if not stage.ended]
    receipt, decode_s = result.receipt, result.timeline.get(Stage.DECODE, 0.0)
    rate = (result.usage.completion_tokens - 1) / decode_s if decode_s else 0.0
    return {
        **{stage.value: _duration(result.timeline.get(stage, 0.0)) for stage in stages},
        "TTFT": _duration(result.ttft_s),
        "JCT": _duration(result.jct_s),
        "output tokens": str(result.usage.completion_tokens),
        "tokens/s": f"{rate:.1f}",
        "chunks": _count(receipt.chunks),
        "KV bytes moved": _count(receipt.kv_bytes, ","),
        "prompt tokens": str(receipt.prompt_tokens),
        "local": _count(receipt.local),
        "adopted": _count(receipt.adopted),
        "recomputed": _count(receipt.recomputed),
        "prefill on": receipt.prefill_instance or "-",
        "decode on": receipt.decode_instance or "-",
    }


def _count(number: int | None, form: str = "") -> str:
    """Format a number; None means that no worker reported it."""
    return "unknown" if number is None else format(number, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


if __name__ == "__main__":
    main(prog_name="bin/demo")
