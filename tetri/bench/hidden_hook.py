"""bench_hidden_hook: measure the cost of the hidden-state hook per step. Runs steps of one engine in one process on one
core, half of them with the hook and the predictor of kind `hidden`, in turns, so that other load on the machine affects
both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click

from tetri.bench.in_process import model_and_predictor, on_one_core
from tetri.bench.report import Program, as_json, give, table
from tetri.engine.base import EngineRequest, Phase
from tetri.engine.vllm.engine import VllmEngine
from tetri.paths import FOLDER
from tetri.predict.model import load
from tetri.proc.hidden import estimates
from tetri.request import Sampling, blocks_for

BLOCK, PROMPT, NEVER = 128, 64, 1 << 30


class Bench:
    """An engine and the predictor `head`, which reads the hidden states of `head.layer`."""

    def __init__(self, engine: VllmEngine, head: Any, clock: Callable[[], float]) -> None:
        self.engine, self.head, self.clock, self.rng = engine, head, clock, Random(7)

    def request(self, key: str, phase: Phase, tokens: Sequence[int], outputs: int) -> EngineRequest:
        """Return an engine request with at most `outputs` output tokens."""
        return EngineRequest(key, phase, tuple(tokens), len(tokens), Sampling(max_tokens=outputs, ignore_eos=True))

    def tokens(self, count: int) -> list[int]:
        """Return random token ids."""
        return [self.rng.randrange(3, 40000) for _ in range(count)]

    def timed(self, on: bool, every: int) -> float:
        """Return the seconds of one step, with the hook if `on`. Creating the hook is not measured."""
        hook = self.engine.hook_hidden_states([self.head.layer], every)
        if not on:
            hook.close()
        start = self.clock()
        self.engine.step()
        if on:
            estimates(hook, self.head)
        seconds = self.clock() - start
        hook.close()
        return seconds

    def pairs(self, count: int, every: int, before: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Measure `count` pairs of steps, with and without the hook; call `before` ahead of each step."""
        found: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * count):
            before()
            on = number % 4 in (1, 2)  # off, on, on, off: slow trends affect both alike
            found[on].append(self.timed(on, every))
        return compared(found[True], found[False])

    def decodes(self, batch: int, outputs: int) -> None:
        """Admit `batch` decode requests to the engine at once."""
        ready = {}
        for number in range(batch):
            tokens = self.tokens(PROMPT)
            self.engine.add(self.request("p", "prefill", tokens, outputs))
            (first,) = self.engine.step().tokens
            blocks = [bytearray(self.engine.block_bytes) for _ in range(blocks_for(PROMPT, BLOCK))]
            self.engine.export("p", 0, len(blocks), views(blocks))
            ready[f"d{number}"] = tokens, blocks, first.token
        for key, (tokens, _, _) in ready.items():
            self.engine.add(self.request(key, "decode", tokens, outputs))
        self.engine.step()
        for key, (_, blocks, token) in ready.items():
            self.engine.adopt(key, 0, views(blocks))
            self.engine.admit(key, token)

    def prompt(self, count: int) -> None:
        """Add a prefill of `count` random tokens."""
        self.engine.add(self.request("p", "prefill", self.tokens(count), 2))


def views(blocks: Sequence[bytearray]) -> list[memoryview]:
    """Return a memoryview of each block."""
    return [memoryview(block) for block in blocks]


def compared(on: Sequence[float], off: Sequence[float]) -> dict[str, Any]:
    """Return the median step without the hook and the extra time with it, with a bootstrapped 95 % interval. Takes
    seconds."""
    rng = Random(1)
    more = [1000 * (a - b) for a, b in zip(on, off, strict=True)]
    medians = sorted(median(rng.choices(more, k=len(more))) for _ in range(1000))
    step = 1000 * median(off)
    low, high = medians[25], medians[974]
    found = {"median": median(more), "low": low, "high": high}
    return {"step_ms": step, "more_ms": found, "percent": 100 * found["median"] / step}


def measure(bench: Bench, count: int, batch: int, prompt: int) -> dict[str, Any]:
    """Measure prefills of `prompt` tokens and decodes of `batch` requests."""
    head = bench.head
    found: dict[str, Any] = {}
    bench.pairs(2, 1, lambda: bench.prompt(prompt))  # warm
    found[f"prefill of {prompt}, taken"] = bench.pairs(max(10, count // 8), 1, lambda: bench.prompt(prompt))
    bench.decodes(batch, bench.engine.capacity.context - PROMPT)
    found[f"decode of {batch}, none taken"] = none = bench.pairs(count, NEVER)
    found[f"decode of {batch}, all taken"] = whole = bench.pairs(count, 1)
    least, most = (each["more_ms"]["median"] for each in (none, whole))
    spread = least + (most - least) / head.every
    found[f"decode of {batch}, each taken every {head.every}"] = {
        "step_ms": none["step_ms"],
        "more_ms": {"median": spread},
        "percent": 100 * spread / none["step_ms"],
    }
    return found


def shown(found: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = []
    for name, row in found.items():
        more = [f"{row['more_ms'][part]:+.3f}" if part in row["more_ms"] else "" for part in ("median", "low", "high")]
        rows.append([name, f"{row['step_ms']:.2f}", *more, f"{row['percent']:+.2f}"])
    return table(("", "step ms", "more ms", "low", "high", "%"), rows)


@click.command(cls=Program)
@click.option("--model", default="smollm2-135m", show_default=True, help="Model name or folder.")
@click.option("--predictor", type=FOLDER, help="Default: the predictor shipped for the model.")
@click.option("--count", type=click.IntRange(1), default=240, show_default=True, help="Pairs of decode steps.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Decode requests in a step.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Prompt tokens.")
@click.option("--cpu", type=click.IntRange(0), help="CPU to run on. Default: the last one.")
@click.option("--busy", is_flag=True, help="Measure CPU time instead of wall time, for a machine with other load.")
@as_json
def main(
    model: str, predictor: Path | None, count: int, batch: int, prompt: int, cpu: int | None, busy: bool, as_json: bool
) -> None:
    """Measure the extra time of a step when lengths are predicted from its hidden states."""
    with on_one_core("bench_hidden_hook", cpu) as out:
        folder, weights, chosen = model_and_predictor(model, predictor)
        head = load(chosen, "hidden", weights)
        context = max(PROMPT + 6 * count, prompt) + 64
        blocks = 1 + batch * (blocks_for(context, BLOCK) + 1)
        engine = VllmEngine(
            folder,
            dtype="bfloat16",
            chunk_tokens=max(prompt, batch + 1) + batch,
            max_batch=batch,
            kv_bytes=blocks * BLOCK * 30 * 3 * 128 * 2,
            context=context,
            weights=weights,
        )
        clock = time.process_time if busy else time.perf_counter
        found = measure(Bench(engine, head, clock), count, batch, prompt)
    give(found, shown(found), as_json, out)


if __name__ == "__main__":
    main(prog_name="bench_hidden_hook")
