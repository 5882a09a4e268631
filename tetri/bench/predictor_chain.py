"""predictor_chain: test the whole life of a length predictor for any model: collect answers of the model, train both
kinds of predictor on their lengths, evaluate them, and serve other prompts with them on a cluster.

    tools/predictor_chain --prompts FILE --count 200

Exit status 0: every step succeeded and every request was answered and had a prediction. 1: a step failed; one line says
which.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import IO, Any

import click

from tetri import atomic
from tetri.bench.deployment import EXPECTED, LOAD_S, SPLIT, own_folder, pinned, polled, running
from tetri.bench.report import Program, as_json, give, progress, table
from tetri.client import AsyncClient, Client, Result
from tetri.config import Config
from tetri.paths import FILE, NEW_FOLDER
from tetri.predict.lengths import PredictError, Prompt, read_prompts

CLI = (sys.executable, "-c", "from tetri.cli import main; main()")
KINDS = ("classifier", "hidden")
WIDTH = 8  # concurrent requests
ANSWER_S = 300.0
HEARTBEATS_S = 10.0  # timeout for the status to include all requests


class StepError(Exception):
    """A step failed; one line with the reason."""


@dataclass(frozen=True)
class Wanted:
    """The arguments of a run: `count` prompts to learn from, `requests` others to serve."""

    prompts: Path
    count: int
    requests: int
    model: str
    max_tokens: int
    seed: int


@dataclass
class Chain:
    """The steps of a run. `folder` has all files; `steps`: name, seconds and result of each finished step."""

    wanted: Wanted
    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[Path] = field(default_factory=list)

    @property
    def predictor(self) -> Path:
        """The folder of the trained predictors."""
        return self.folder / "predictor"

    def run(self) -> None:
        """Run all steps. Raises StepError."""
        learnt, others = drawn(self.wanted)
        write(self.folder / "prompts.jsonl", learnt)
        self._step("collect", self._collect)
        for kind in KINDS:
            self._step(f"train {kind}", partial(self._train, kind))
        self._step("evaluate", self._evaluate)
        self._step("serve", lambda: serve(self, others))

    def _step(self, name: str, work: Callable[[], str]) -> None:
        began = time.monotonic()
        try:
            result = work()
        except (StepError, *EXPECTED) as error:
            raise StepError(f"{name}: {error}") from None
        self.steps.append({"step": name, "seconds": round(time.monotonic() - began, 1), "result": result})
        progress(f"{name:<20} {self.steps[-1]['seconds']:7.1f} s  {result}")

    def _collect(self) -> str:
        """Collect answers in two processes with half of the CPUs each: faster than one process with two threads."""
        model = ["--model", self.wanted.model, "--max-tokens", str(self.wanted.max_tokens), "--kv-mib", "1024"]
        prompts = read_prompts(self.folder / "prompts.jsonl")[0]
        cpus = sorted(os.sched_getaffinity(0))
        lines = []
        for part in range(min(2, len(cpus))):
            file = self.folder / f"prompts{part}.jsonl"
            write(file, prompts[part :: min(2, len(cpus))])
            self.lengths.append(self.folder / f"lengths{part}.jsonl")
            mine = ",".join(map(str, cpus[part::2] if len(cpus) > 1 else cpus))
            lines.append(["collect", "--prompts", str(file), *model, "--cpus", mine, "--out", str(self.lengths[part])])
        found = commands(*lines)
        texts = sum(each["texts"] for each in found)
        mean = sum(each["mean"] * each["texts"] for each in found) / texts
        return f"{texts} texts, {mean:.0f} tokens in the mean, {sum(each['cut'] for each in found)} cut off"

    def _train(self, kind: str) -> str:
        out = ["--out", str(self.predictor), "--seed", str(self.wanted.seed)]
        (found,) = commands(["train", *self._from_lengths(), "--kind", kind, *out])
        return f"on {found['n']} held out, right at 100, 200, 400: {right(found['acc'])}; tau {found['tau']:.2f}"

    def _evaluate(self) -> str:
        of = ["--predictor", str(self.predictor), "--prompts", str(self.folder / "prompts.jsonl")]
        (found,) = commands(["eval", *of, *self._from_lengths(), "--kind", "both"])
        each = [f"{kind} {right(scores['acc'])}" for kind, scores in found["kinds"].items()]
        return f"on {found['n']} held out: {', '.join(each)}; likeliest bucket {right(found['majority'])}"

    def _from_lengths(self) -> list[str]:
        return [argument for path in self.lengths for argument in ("--lengths", str(path))]


def right(shares: dict[str, float]) -> str:
    """Format the accuracy for ranges of 100, 200 and 400 tokens."""
    return " / ".join(f"{shares[width]:.2f}" for width in ("100", "200", "400"))


def drawn(wanted: Wanted) -> tuple[list[Prompt], list[Prompt]]:
    """Draw the prompts to learn from and the prompts to serve. Raises StepError."""
    try:
        prompts, bad = read_prompts(wanted.prompts)
    except PredictError as error:
        raise StepError(f"prompts: {error}") from None
    if len(prompts) < wanted.count + wanted.requests:
        needed = f"{wanted.count} to learn from and {wanted.requests} to serve are needed"
        raise StepError(f"prompts: {wanted.prompts} has {len(prompts)} and {len(bad)} bad lines: {needed}")
    found = Random(wanted.seed).sample(prompts, wanted.count + wanted.requests)
    return found[: wanted.count], found[wanted.count :]


def write(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSONL."""
    lines = (json.dumps({"prompt": prompt.text, "source": prompt.source}) for prompt in prompts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def commands(*lines: Sequence[str]) -> list[dict[str, Any]]:
    """Run `tetri-cli predictor` with each of `lines` in parallel and return their JSON results. Only the progress of
    the first is shown. Raises StepError."""
    with ExitStack() as stack:
        running: list[tuple[subprocess.Popen[str], IO[str] | None]] = []
        for line in lines:
            log: IO[str] | None = stack.enter_context(tempfile.TemporaryFile("w+")) if running else None
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log}
            process = stack.enter_context(subprocess.Popen([*CLI, "predictor", *line, "--json"], text=True, **pipes))
            running.append((process, log))
        outs = []
        try:
            for process, log in running:
                outs.append(process.communicate()[0])
                if process.returncode == 130:
                    raise KeyboardInterrupt
                if process.returncode:
                    raise StepError(f"exit status {process.returncode}{_last_line(log)}")
        except BaseException:
            for process, _ in running:
                process.kill()  # its files are valid at any time
                process.wait()
            raise
    return [json.loads(out) for out in outs]


def _last_line(log: IO[str] | None) -> str:
    if log is None:
        return ", see above"
    log.seek(0)
    return f": {log.read().strip().rpartition(chr(10))[2]}"


def serve(chain: Chain, prompts: Sequence[Prompt]) -> str:
    """Start a cluster with the new predictor, send all prompts and check that lengths were predicted. Raises
    StepError."""
    more = ["policy.length=trained", "predictor.kind=both", f"predictor.folder={chain.predictor}"]
    more += [f"model.name={chain.wanted.model}"]
    run_dir = chain.folder / "run"
    run_dir.mkdir()
    config = pinned(SPLIT, run_dir, "chain", sorted(os.sched_getaffinity(0)), more)
    with running(config, progress, LOAD_S):
        results = asyncio.run(answers(config, prompts, chain.wanted))
        return judged(results, reported(config, len(prompts)))


async def answers(config: Config, prompts: Sequence[Prompt], wanted: Wanted) -> list[Result]:
    """Send all prompts, WIDTH at a time, and return the results. Raises TetriError."""
    in_flight = asyncio.Semaphore(WIDTH)
    async with AsyncClient(config.clients_address, timeout=ANSWER_S) as client:

        async def ask(number: int, prompt: Prompt) -> Result:
            async with in_flight:
                return await client.generate(
                    messages=[{"role": "user", "content": prompt.text}],
                    max_tokens=wanted.max_tokens,
                    temperature=0.7,
                    seed=wanted.seed + number,
                )

        return await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(prompts)))


def reported(config: Config, requests: int) -> list[dict[str, Any]]:
    """Return the predictor status of each prefill worker after they have scored this many requests together. Raises
    StepError after a timeout."""
    with Client(config.clients_address) as client:

        def read() -> list[dict[str, Any]]:
            found = [each.get("predictor") for each in client.status()["instances"] if each["role"] == "prefill"]
            return [each for each in found if each]

        def enough(ours: list[dict[str, Any]]) -> bool:
            return bool(sum(each["scored"] for each in ours) >= requests)

        ours = polled(read, enough, HEARTBEATS_S, 0.2)
    if not enough(ours):
        raise StepError(f"fewer than {requests} requests were scored: {json.dumps(ours)}")
    subprocess.run([*CLI, "status", "--set", f"cluster.run_dir={config.run_dir}"], check=True, stdout=2)
    return ours


def judged(results: Sequence[Result], predictors: Sequence[dict[str, Any]]) -> str:
    """Return one line about the results. Raises StepError if an answer or a prediction is missing."""
    empty = [result.rid for result in results if not result.token_ids]
    if empty:
        raise StepError(f"{len(empty)} of {len(results)} requests were not answered, such as {empty[0]}")
    counts = {name: sum(each[name] for each in predictors) for name in ("predicted", "late", "right", "inside")}
    if counts["predicted"] < len(results):
        raise StepError(f"{counts['predicted']} of {len(results)} requests had a prediction")
    tokens = sum(len(result.token_ids) for result in results)
    return f"{len(results)} requests, {tokens} tokens; {', '.join(f'{n} {name}' for name, n in counts.items())}"


@click.command(cls=Program)
@click.option("--prompts", type=FILE, required=True, help='JSONL with {"prompt": TEXT} lines.')
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Prompts to learn from.")
@click.option("--requests", type=click.IntRange(1), default=24, show_default=True, help="Other prompts to serve.")
@click.option("--model", default="smollm2-135m", show_default=True, help="Model name or checkpoint folder.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="The most output tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--keep", type=NEW_FOLDER, help="Keep lengths and predictor in this new folder.")
@as_json
def main(keep: Path | None, as_json: bool, **wanted: Any) -> None:
    """Collect, train, evaluate and serve a length predictor, and show the time of each step."""
    began, problem, status = time.monotonic(), "", 0
    with own_folder("chain") as folder, kept(folder, keep):
        chain = Chain(Wanted(**wanted), folder)
        try:
            chain.run()
        except StepError as error:
            problem, status = str(error), 1
        except KeyboardInterrupt:
            problem, status = "interrupted; everything is stopped", 130
        seconds = round(time.monotonic() - began, 1)
        found = {"steps": chain.steps, "seconds": seconds, "problem": problem, "ok": not problem}
        give(found, summary(chain.steps, seconds), as_json)
        if problem:
            progress(f"predictor_chain: {problem}")
    sys.exit(status)


@contextmanager
def kept(folder: Path, keep: Path | None) -> Iterator[None]:
    """At the end, also after an error, copy the files of `folder` to `keep`. Raises OSError."""
    try:
        yield
    finally:
        if keep:
            with atomic.folder(keep) as part:
                shutil.copytree(folder, part, ignore=shutil.ignore_patterns("run"), dirs_exist_ok=True)


def summary(steps: Sequence[dict[str, Any]], seconds: float) -> str:
    """Format the steps as a table."""
    rows = [[each["step"], f"{each['seconds']:.1f}", each["result"]] for each in steps]
    return table(("step", "seconds", "result"), [*rows, ["all", f"{seconds:.1f}", ""]])


if __name__ == "__main__":
    main(prog_name="predictor_chain")
