"""bench_predictor: measure the cost of a length predictor. Runs one engine and one predictor in one process on one
core, as in a prefill worker. Prompts are computed with and without the predictor in turns, so that other load on the
machine affects both alike.

`paired` is the difference to the prompt without predictor of the same round, in percent of the median without: its
median and its middle half."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click

from tetri.bench.in_process import model_and_predictor, on_one_core
from tetri.bench.report import Program, Progress, as_json, give, progress, spread, table
from tetri.engine.base import EngineRequest
from tetri.engine.vllm.engine import VllmEngine
from tetri.paths import FOLDER
from tetri.predict import serve
from tetri.predict.card import KINDS
from tetri.predict.inputs import reader
from tetri.predict.lengths import PredictError
from tetri.predict.model import Loaded, load
from tetri.proc.hidden import estimates
from tetri.request import Sampling
from tetri.text import Tokenizer, load_tokenizer

#: Limits: milliseconds of a batch of 16 prompts of 100 tokens; percent that prefill may take longer, by prompt tokens
BATCH_MS, BATCH_PROMPTS, BATCH_TOKENS = 250.0, 16, 100
MORE_PERCENT = {256: 10.0, 1024: 3.0}  # from this many tokens on
WAYS = ("parallel", "sequential", "hidden", "both")
ANSWER_S = 30.0
TEXT = """the of and to in a is that for it was on are as with they be at one have this from or had by word but what
some we can out other were all there when up use your how said an each she which do their time if will way about many
then them write would like so these her long make thing see him two has look more day could go come did number sound no
most people my over know water than call first who may down side been now find any new work part take get place made
live where after back little only round man year came show every good me give our under name very through just form
sentence great think say help low line differ turn cause much mean before move right boy old too same tell does set
explain describe Python function summarize French essay list story poem question answer short detailed email recipe
"""


class Bench:
    """An engine and its predictors by kind; `nice` is the niceness of the classifier's thread."""

    def __init__(self, engine: VllmEngine, tokenizer: Tokenizer, parts: dict[str, Loaded], nice: int) -> None:
        self.engine, self.tokenizer, self.parts = engine, tokenizer, parts
        self.rng, self.number, self.vocabulary = Random(7), 0, TEXT.split()
        logger = logging.getLogger("bench_predictor")
        self.beside: serve.Parallel | None = None
        self.before: serve.Sequential | None = None
        if (classifier := parts.get("classifier")) is not None:
            reading = serve.Reading(classifier, reader(tokenizer), classifier.card.cut, logger)
            self.beside = serve.Parallel(reading, lambda: None, nice=nice, begin=serve.one_core)
            self.before = serve.Sequential(reading)

    def close(self) -> None:
        """Stop the classifier's thread."""
        if self.beside is not None:
            self.beside.close()

    def prompt(self, tokens: int) -> list[int]:
        """Return this many token ids of random English words."""
        text = " ".join(self.rng.choice(self.vocabulary) for _ in range(tokens + 8))
        return self.tokenizer.encode(text)[:tokens]

    def timed(self, way: str, tokens: int) -> tuple[float, bool]:
        """Return the seconds from the request to its first token, and whether its length was predicted by then."""
        self.number += 1
        key, prompt = f"r{self.number}", self.prompt(tokens)
        request = EngineRequest(key, "prefill", tuple(prompt), tokens, Sampling(max_tokens=2))
        head = self.parts["hidden"] if way in ("hidden", "both") else None
        hook = self.engine.hook_hidden_states([head.layer], head.every) if head is not None else None
        start = time.perf_counter()
        answered = self._ask(way, key, prompt)
        self.engine.add(request)
        while not self.engine.step().tokens:
            pass
        estimated = bool(hook is not None and head is not None and estimates(hook, head))
        seconds = time.perf_counter() - start
        if hook is not None:
            hook.close()
        classified = self._drained(way, tokens)
        return seconds, estimated or answered or classified

    def _ask(self, way: str, key: str, prompt: Sequence[int]) -> bool:
        if way == "sequential" and self.before is not None:
            answer = self.before.ask(key, prompt)
            return answer is not None and answer[1] is not None
        if self._beside(way, len(prompt)) and self.beside is not None:
            self.beside.ask(key, prompt)
        return False

    def _beside(self, way: str, tokens: int) -> bool:
        """Whether the classifier's thread is used: with both kinds only for prompts of more than one chunk."""
        return way == "parallel" or (way == "both" and tokens > self.engine.capacity.chunk_tokens)

    def _drained(self, way: str, tokens: int) -> bool:
        """Wait for the classifier's thread, so that its work does not slow down the next prompt. Returns whether it had
        already answered. Raises PredictError."""
        if self.beside is None or not self._beside(way, tokens):
            return False
        if any(distribution is not None for _, distribution in self.beside.answers()):
            return True
        until = time.monotonic() + ANSWER_S
        while not any(True for _ in self.beside.answers()):
            if time.monotonic() > until:
                raise PredictError(f"the classifier does not answer: {self.beside.trouble or 'time-out'}")
            time.sleep(0.0005)
        return False

    def batches(self, count: int) -> dict[str, Any]:
        """Measure `count` batches of 16 prompts of 100 encoder tokens."""
        classifier = self.parts["classifier"]
        found: list[float] = []
        for _ in range(count + 2):
            texts = [self._text(classifier) for _ in range(BATCH_PROMPTS)]
            start = time.perf_counter()
            classifier.classify(texts)
            found.append(1000 * (time.perf_counter() - start))
        samples = spread(found[2:])
        ok = samples["median"] <= BATCH_MS
        return {"prompts": BATCH_PROMPTS, "tokens": BATCH_TOKENS, "ms": samples, "limit_ms": BATCH_MS, "ok": ok}

    def _text(self, classifier: Loaded) -> str:
        vocabulary = [self.rng.choice(self.vocabulary) for _ in range(BATCH_TOKENS)]
        while classifier.read([" ".join(vocabulary)])[1][0] > BATCH_TOKENS:
            vocabulary.pop()
        return " ".join(vocabulary)

    def compare(self, ways: Sequence[str], tokens: int, rounds: int) -> dict[str, Any]:
        """Compute a prompt without a predictor and one in each way, in random order, in each round."""
        seconds: dict[str, list[float]] = {way: [] for way in ("without", *ways)}
        in_time = dict.fromkeys(ways, 0)
        for number in range(rounds + 1):
            for way in self.rng.sample(list(seconds), len(seconds)):
                elapsed, estimated = self.timed(way, tokens)
                if number:  # the first round warms up
                    seconds[way].append(elapsed)
                    if way in in_time:
                        in_time[way] += estimated
        without = median(seconds["without"])
        return {
            "without_ms": 1000 * without,
            "limit_percent": limit_percent(tokens),
            "ways": {way: compared(seconds[way], seconds["without"], in_time[way]) for way in ways},
        }


def compared(samples: Sequence[float], without: Sequence[float], in_time: int) -> dict[str, Any]:
    """Compare the seconds with a predictor and without, round by round. `in_time`: answers before the first token."""
    base = median(without)
    differences = sorted(a - b for a, b in zip(samples, without, strict=True))
    low, high = differences[len(differences) // 4], differences[-1 - len(differences) // 4]
    return {
        "ms": 1000 * median(samples),
        "percent": 100 * (median(samples) - base) / base,
        "paired": {"median": 100 * median(differences) / base, "low": 100 * low / base, "high": 100 * high / base},
        "in_time": in_time / len(samples),
    }


def limit_percent(tokens: int) -> float | None:
    """Return how many percent longer a prompt of this many tokens may take; None without a limit."""
    limits = [limit for least, limit in MORE_PERCENT.items() if tokens >= least]
    return min(limits) if limits else None


@contextmanager
def built(model: str, folder: Path | None, chunk: int, longest: int, nice: int) -> Iterator[Bench]:
    """Load engine and predictors. Raises ModelError, EngineError and PredictError, one line."""
    place, weights, folder = model_and_predictor(model, folder)
    parts = {kind: load(folder, kind, weights) for kind in KINDS if (folder / kind).is_dir()}
    if not parts:
        raise PredictError(f"there is no predictor in {folder}")
    engine = VllmEngine(
        place,
        dtype="bfloat16",
        chunk_tokens=chunk,
        max_batch=8,
        kv_bytes=512 << 20,
        context=max(2048, longest + 8),
        weights=weights,
    )
    with closing(engine), closing(Bench(engine, load_tokenizer(place), parts, nice)) as bench:
        yield bench


@dataclass(frozen=True)
class Asked:
    """What to measure: prompt lengths in tokens, rounds and ways to predict."""

    lengths: tuple[int, ...]
    rounds: int
    ways: tuple[str, ...]


def measured(bench: Bench, asked: Asked, progress: Progress) -> dict[str, Any]:
    """Measure everything that was asked for and that the predictors can do."""
    ways = [way for way in asked.ways if _parts(way) <= set(bench.parts)]
    found: dict[str, Any] = {"cpu": sorted(os.sched_getaffinity(0)), "rounds": asked.rounds, "batch": None}
    if "classifier" in bench.parts:
        progress("batches of 16 prompts")
        found["batch"] = bench.batches(asked.rounds)
    found["prefill"] = {}
    for tokens in asked.lengths:
        progress(f"prompts of {tokens} tokens, {', '.join(ways)}")
        found["prefill"][str(tokens)] = bench.compare(ways, tokens, asked.rounds)
    return found


def _parts(way: str) -> set[str]:
    return {"hidden": {"hidden"}, "both": {"hidden", "classifier"}}.get(way, {"classifier"})


def shown(found: dict[str, Any]) -> str:
    """Format the results as text."""
    lines = []
    if (batch := found["batch"]) is not None:
        lines.append(
            f"a batch of {batch['prompts']} prompts of {batch['tokens']} tokens: median {batch['ms']['median']:.0f} ms,"
            f" worst {batch['ms']['worst']:.0f} ms (limit {batch['limit_ms']:.0f} ms)"
        )
    for tokens, made in found["prefill"].items():
        limit = "none" if made["limit_percent"] is None else f"{made['limit_percent']:.0f} %"
        lines.append(f"prefill of {tokens} tokens: {made['without_ms']:.1f} ms without a predictor (limit {limit})")
        rows = []
        for way, each in made["ways"].items():
            pairs = [f"{each['paired'][name]:+.1f}" for name in ("median", "low", "high")]
            rows.append([way, f"{each['ms']:.1f}", f"{each['percent']:+.1f}", *pairs, f"{100 * each['in_time']:.0f}"])
        if rows:
            lines.append(table(("", "ms", "medians %", "in pairs %", "low", "high", "in time %"), rows))
    return "\n".join(lines)


@click.command(cls=Program)
@click.option("--model", default="smollm2-135m", show_default=True, help="Model name or folder.")
@click.option("--predictor", type=FOLDER, help="Default: the predictor shipped for the model.")
@click.option("--tokens", "lengths", type=click.IntRange(1), multiple=True, default=(256, 1024, 1536),
              show_default=True, help="Prompt tokens; may be repeated.")  # fmt: skip
@click.option("--way", "ways", type=click.Choice(WAYS), multiple=True, default=WAYS,
              help="May be repeated. Default: all.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True)
@click.option("--chunk", type=click.IntRange(1), default=512, show_default=True, help="Tokens in a step.")
@click.option(
    "--nice",
    type=click.IntRange(0, 19),
    default=serve.NICE,
    show_default=True,
    help="Niceness of the classifier's thread.",
)
@click.option("--cpu", type=click.IntRange(0), help="CPU to run on. Default: the last one.")
@as_json
def main(
    model: str,
    predictor: Path | None,
    lengths: tuple[int, ...],
    ways: tuple[str, ...],
    rounds: int,
    chunk: int,
    nice: int,
    cpu: int | None,
    as_json: bool,
) -> None:
    """Measure the cost of an output length predictor. Takes some minutes and needs an idle machine."""
    with on_one_core("bench_predictor", cpu) as out, built(model, predictor, chunk, max(lengths), nice) as bench:
        found = measured(bench, Asked(lengths, rounds, ways), progress)
    give(found, shown(found), as_json, out)


if __name__ == "__main__":
    main(prog_name="bench_predictor")
