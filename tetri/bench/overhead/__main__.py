"""bench_overhead: measure the overhead of tetri: tokens per second of a steady batch against plain vLLM, and the time
of the hand-over.

Both engines stay loaded on the same core and compute in turns, one at a time.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tetri.bench.deployment import EXPECTED, REPOSITORY, SPLIT, configured, own_folder
from tetri.bench.overhead.direct import Direct
from tetri.bench.overhead.live import Live
from tetri.bench.overhead.measure import steady, summary
from tetri.bench.report import BenchError, Program, as_json, give, one_line, overrides, progress, split_conf, table
from tetri.config import Config
from tetri.models import find
from tetri.proc.build import limits_of_model
from tetri.proc.cpus import chosen, listed, pin
from tetri.text import load_tokenizer

TEXT = REPOSITORY / "LICENSE"
HANDOVER_TOKENS = (20, 128, 500, 1000, 300, 60)  # prompt tokens of the requests whose hand-over is timed


@dataclass(frozen=True)
class Load:
    """`requests` concurrent requests with `tokens` output tokens and `prompt_tokens` each; `rounds` of both sides."""

    requests: int
    tokens: int
    prompt_tokens: int
    rounds: int


@click.command(cls=Program)
@click.option("--requests", type=click.IntRange(2), default=16, show_default=True, help="Concurrent requests.")
@click.option("--tokens", type=click.IntRange(16), default=256, show_default=True, help="Output tokens of each.")
@click.option(
    "--prompt-tokens", type=click.IntRange(1, 1500), default=64, show_default=True, help="Prompt tokens of each."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds of direct and live.")
@split_conf
@overrides
@as_json
def main(
    requests: int,
    tokens: int,
    prompt_tokens: int,
    rounds: int,
    conf: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the overhead of tetri over vLLM. Takes some minutes and needs an idle machine."""
    with one_line("bench_overhead", *EXPECTED), own_folder("overhead") as folder:
        config = configure(conf or SPLIT, overrides, folder)
        found = measure(config, folder, Load(requests, tokens, prompt_tokens, rounds))
    give(found, shown(found), as_json)


def configure(conf: Path, overrides: tuple[str, ...], folder: Path) -> Config:
    """Load the configuration with its own run directory and the broker on the prefill worker's CPUs, unless pinned."""
    # A worker that is stopped for a round must not count as dead.
    own = ["cluster.dead_s=3600"]
    config = configured(conf, folder, "overhead", [*own, *overrides])
    if config.engine.kind != "vllm":
        raise BenchError("only the real engine can be compared with vLLM: use a configuration with engine.kind = vllm")
    cpus = next(worker.cpus for worker in config.workers if worker.role == "prefill")
    if config.broker.cpus or not cpus:
        return config
    return configured(conf, folder, "overhead", [*own, f"broker.cpus={cpus}", *overrides])


def measure(config: Config, folder: Path, work: Load) -> dict[str, Any]:
    """Load both sides, run all rounds and return the summary. Raises BenchError and the errors of EXPECTED."""
    prefill, decode = (next(w for w in config.workers if w.role == role) for role in ("prefill", "decode"))
    own = chosen(decode.cpus)
    if len(own) != 1:
        raise BenchError(f"worker {decode.iid} must be pinned to one CPU, so that plain vLLM can have the same")
    model = find(config.model.name)
    ids = load_tokenizer(model).encode(TEXT.read_text(encoding="utf-8"))
    most = limits_of_model(config)[0] - work.prompt_tokens
    prompts = [ids[(start := 16 * i) : start + work.prompt_tokens] for i in range(work.requests)]
    with ExitStack() as stack:
        progress(f"loading plain vLLM on {listed([*own])} and the live cluster")
        direct = Direct(settings(config, model), min(own), folder / "direct.log")
        stack.callback(direct.close)
        live = Live(config, progress)
        stack.callback(live.close)
        direct.wait_ready()
        pin(prefill.cpus)  # for the client
        direct.run(prompts, 16)  # warm-up
        live.run(prompts, 16)
        measured = []
        for number in range(1, work.rounds + 1):
            measured.append(one_round(direct, live, prompts, work.tokens, most, [ids[:n] for n in HANDOVER_TOKENS]))
            rates = {name: f"{measured[-1][name]['tok_s']:.1f} tokens/s" for name in ("direct", "live")}
            progress(f"round {number} of {work.rounds}: direct {rates['direct']}, live {rates['live']}")
    return summary(measured)


def settings(config: Config, model: Path) -> dict[str, Any]:
    """Return the parameters of `direct.engine_arguments` for this configuration."""
    return {
        "model": str(model),
        "dtype": config.model.dtype,
        "context": config.model.context,
        "chunk_tokens": config.engine.chunk_tokens,
        "max_batch": config.engine.max_batch,
        "block_tokens": config.engine.block_tokens,
        "kv_bytes": config.engine.kv_mib << 20,
    }


def one_round(
    direct: Direct, live: Live, prompts: list[list[int]], tokens: int, most: int, others: list[list[int]]
) -> dict[str, Any]:
    """Measure both sides once. `most`: output tokens that fit into the context after a prompt."""
    with live.stopped():
        alone = direct.run(prompts, tokens)
    with direct.stopped():
        served = live.run(prompts, tokens)
        idle, busy = live.idle_handovers(others), live.busy_handovers(prompts, tokens, most, others)
    return {
        "direct": steady(alone),
        "live": steady(served),
        "same_outputs": sum(a == b for a, b in zip(alone["ids"], served["ids"], strict=True)),
        "idle": idle,
        "busy": busy,
    }


def shown(found: dict[str, Any]) -> str:
    """Format the results as text."""
    rows = []
    for number, (measured, ratio) in enumerate(zip(found["rounds"], found["ratios"], strict=True), 1):
        direct, live = measured["direct"], measured["live"]
        rates = [f"{direct['tok_s']:.1f}", f"{live['tok_s']:.1f}", f"{ratio:.3f}"]
        rows.append([f"round {number}", *rates, *(f"{side['step_ms']['median']:.1f}" for side in (direct, live))])
    lines = [table(("", "direct tok/s", "live tok/s", "ratio", "direct step ms", "live step ms"), rows)]
    lines.append(f"median ratio {found['ratio']:.3f}; of CPU time a step {found['cpu_ratio']:.3f}")
    for state, measured in found["handover"].items():
        lines.append(
            f"hand-over, decode worker {state}: {measured['ms']['median']:.0f} ms (at most"
            f" {measured['ms']['worst']:.0f}); two steps + 10 ms are {measured['limit_ms']:.0f} ms"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="bench_overhead")
