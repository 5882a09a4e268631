"""tools/bench_tap: steps of one engine in one process on one core, every other one with the tap and the head of the
predictor of kind `hidden`, so that whatever else the machine does falls on both alike."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click

from tetri.engine.base import EngineError, EngineRequest, Phase
from tetri.engine.vllm.engine import VllmEngine
from tetri.engine_request import StepDone
from tetri.models import ModelError, find, weights_hash
from tetri.predict.lengths import PredictError
from tetri.predict.model import load, shipped_for
from tetri.proc.hidden import estimates
from tetri.request import Sampling, blocks_for

BLOCK, PROMPT, NEVER = 128, 64, 1 << 30
Step = Callable[[], StepDone]


class Bench:
    """`head` is asked with the states of `layer`."""

    def __init__(self, engine: VllmEngine, head: Any, clock: Callable[[], float]) -> None:
        self.engine, self.head, self.clock, self.rng = engine, head, clock, Random(7)

    def request(self, key: str, phase: Phase, tokens: Sequence[int], outputs: int) -> EngineRequest:
        return EngineRequest(key, phase, tuple(tokens), len(tokens), Sampling(max_tokens=outputs, ignore_eos=True))

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, 40000) for _ in range(count)]

    def timed(self, on: bool, every: int) -> float:
        """Seconds of one step. The tap is made either way: its making is not what is measured."""
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

    def pairs(self, count: int, every: int, before: Callable[[], None] = lambda: None) -> dict[str, float]:
        """`count` pairs of steps, with and without, in turns."""
        found: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * count):
            before()
            on = number % 4 in (1, 2)  # off, on, on, off: what grows slowly falls on both alike
            found[on].append(self.timed(on, every))
        return compared(found[True], found[False])

    def decodes(self, batch: int, outputs: int) -> None:
        """Bring so many decodes into the running batch, all at once."""
        ready = {}
        for number in range(batch):
            tokens = self.tokens(PROMPT)
            self.engine.add(self.request("p", "prefill", tokens, outputs))
            (first,) = self.engine.step().tokens
            blocks = [bytearray(self.engine.block_bytes) for _ in range(blocks_for(PROMPT, BLOCK))]
            self.engine.export("p", 0, len(blocks), list(map(memoryview, blocks)))
            ready[f"d{number}"] = tokens, blocks, first.token
        for key, (tokens, _, _) in ready.items():
            self.engine.add(self.request(key, "decode", tokens, outputs))
        self.engine.step()
        for key, (_, blocks, token) in ready.items():
            self.engine.adopt(key, 0, list(map(memoryview, blocks)))
            self.engine.admit(key, token)

    def prompt(self, count: int) -> None:
        self.engine.add(self.request("p", "prefill", self.tokens(count), 2))


def compared(on: Sequence[float], off: Sequence[float]) -> dict[str, float]:
    """Milliseconds: of a step without, and what it takes more with; 95 % of resampled medians lie from `low` to
    `high`."""
    rng = Random(1)
    more = [1000 * (a - b) for a, b in zip(on, off, strict=True)]
    medians = sorted(median(rng.choices(more, k=len(more))) for _ in range(1000))
    step = 1000 * median(off)
    low, high = medians[25], medians[974]
    return {"step_ms": step, "more_ms": median(more), "low": low, "high": high, "percent": 100 * median(more) / step}


def measure(bench: Bench, count: int, batch: int, prompt: int) -> dict[str, Any]:
    head = bench.head
    found: dict[str, Any] = {}
    bench.pairs(2, 1, lambda: bench.prompt(prompt))  # warm
    found[f"prefill of {prompt}, taken"] = bench.pairs(max(10, count // 8), 1, lambda: bench.prompt(prompt))
    bench.decodes(batch, bench.engine.capacity.context - PROMPT)
    found[f"decode of {batch}, none taken"] = none = bench.pairs(count, NEVER)
    found[f"decode of {batch}, all taken"] = whole = bench.pairs(count, 1)
    spread = none["more_ms"] + (whole["more_ms"] - none["more_ms"]) / head.every
    found[f"decode of {batch}, each taken every {head.every}"] = {
        "step_ms": none["step_ms"],
        "more_ms": spread,
        "percent": 100 * spread / none["step_ms"],
    }
    return found


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Name or folder.")
@click.option("--predictor", type=click.Path(file_okay=False), help="Folder; by default the one shipped for the model.")
@click.option("--count", default=240, show_default=True, help="Pairs of decode steps.")
@click.option("--batch", default=16, show_default=True)
@click.option("--prompt", default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--cpu", default=-1, show_default=True, help="Core to run on; -1: the last one.")
@click.option("--busy", is_flag=True, help="Count CPU seconds: for a machine that does other things as well.")
@click.option("--json", "as_json", is_flag=True)
def main(
    model: str, predictor: str | None, count: int, batch: int, prompt: int, cpu: int, busy: bool, as_json: bool
) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if cpu < 0 else cpu})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    try:
        folder = find(model)
        weights = weights_hash(folder)
        chosen = Path(predictor) if predictor else shipped_for(weights)
        if chosen is None:
            raise PredictError(f"no predictor is shipped for {model}: give --predictor")
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
    except (EngineError, ModelError, PredictError) as error:
        click.echo(f"bench_tap: {error}", err=True)
        sys.exit(2)
    found = measure(Bench(engine, head, time.process_time if busy else time.perf_counter), count, batch, prompt)
    if as_json:
        click.echo(json.dumps(found, indent=1), answers)
    for name, row in found.items() if not as_json else ():
        sure = f" ({row['low']:+.3f} to {row['high']:+.3f})" if "low" in row else ""
        more = f"{row['more_ms']:+8.3f} ms{sure:22} {row['percent']:+6.2f} %"
        click.echo(f"{name:36} {row['step_ms']:8.2f} ms {more}", answers)


if __name__ == "__main__":
    main()
