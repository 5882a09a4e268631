"""What the live path costs: tokens per second of a steady batch, live against plain vLLM, and the hand-over's time.

Both engines stay loaded, on the same core; only one of them computes at a time, and they take turns.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from direct import Direct
from live import Live
from measure import BenchError, steady, summary

from tetri.client import TetriError
from tetri.config import Config, cpu_numbers, default_path, load
from tetri.models import ModelError, find
from tetri.proc.launch import LaunchError
from tetri.strict import ConfigError
from tetri.text import load_tokenizer

EXPECTED = (BenchError, ConfigError, LaunchError, ModelError, TetriError)
TEXT = Path(__file__).parent.parent.parent / "LICENSE"
HANDOVER_TOKENS = (20, 128, 500, 1000, 300, 60)  # lengths of the prompts whose hand-over is timed


@dataclass(frozen=True)
class Load:
    """`requests` that run together, `tokens` of output and `prompt_tokens` each; `rounds` of both sides."""

    requests: int
    tokens: int
    prompt_tokens: int
    rounds: int


@click.command()
@click.option("--requests", type=click.IntRange(2), default=16, show_default=True, help="Requests that run together.")
@click.option("--tokens", type=click.IntRange(16), default=256, show_default=True, help="Output tokens of each.")
@click.option("--prompt-tokens", type=click.IntRange(1, 1500), default=64, show_default=True, help="Of each.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of direct and live.")
@click.option("--conf", type=click.Path(dir_okay=False, path_type=Path), help="Configuration to measure.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def main(
    requests: int,
    tokens: int,
    prompt_tokens: int,
    rounds: int,
    conf: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure what tetri adds to vLLM. Takes some minutes and wants a machine on which nothing else runs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped again
    folder = Path(tempfile.mkdtemp(prefix="tetri-", dir="/tmp"))  # Unix sockets need a short path
    try:
        config = configure(conf or default_path(), overrides, folder)
        found = measure(config, folder, Load(requests, tokens, prompt_tokens, rounds))
    except EXPECTED as error:
        click.echo(f"bench_overhead: {error}", err=True)
        sys.exit(1)
    finally:
        shutil.rmtree(folder)
    click.echo(json.dumps(found) if as_json else table(found))


def configure(conf: Path, overrides: tuple[str, ...], folder: Path) -> Config:
    """The configuration with a run directory of its own and, where it pins none, the broker beside the prefill."""
    # Nobody may be given up while it is stopped.
    own = [f"cluster.run_dir={folder}", f"cluster.name=b{os.getpid()}", "cluster.dead_s=3600"]
    config = load(conf, [*own, *overrides])
    if config.engine.kind != "vllm":
        raise BenchError("only the real engine can be compared with vLLM: give a configuration with engine.kind = vllm")
    cpus = next(worker.cpus for worker in config.workers if worker.role == "prefill")
    return config if config.broker.cpus or not cpus else load(conf, [*own, f"broker.cpus={cpus}", *overrides])


def measure(config: Config, folder: Path, work: Load) -> dict[str, Any]:
    prefill, decode = (next(w for w in config.workers if w.role == role) for role in ("prefill", "decode"))
    if not decode.cpus.isdecimal():
        raise BenchError(f"worker {decode.iid} must be pinned to one CPU, so that plain vLLM can have the same")
    model = find(config.model.name)
    ids = load_tokenizer(model).encode(TEXT.read_text(encoding="utf-8"))
    prompts = [ids[(start := 16 * i) : start + work.prompt_tokens] for i in range(work.requests)]
    with ExitStack() as stack:
        say(f"loading plain vLLM on CPU {decode.cpus} and the live cluster")
        direct = Direct(settings(config, model), int(decode.cpus), folder / "direct.log")
        stack.callback(direct.close)
        live = Live(config, say)
        stack.callback(live.close)
        direct.wait_ready()
        if prefill.cpus:
            os.sched_setaffinity(0, cpu_numbers(prefill.cpus))  # the client's place
        direct.run(prompts, 16)  # warm-up
        live.run(prompts, 16)
        taken = []
        for number in range(1, work.rounds + 1):
            taken.append(one_round(direct, live, prompts, work.tokens, [ids[:n] for n in HANDOVER_TOKENS]))
            rates = {name: f"{taken[-1][name]['tok_s']:.1f} tokens/s" for name in ("direct", "live")}
            say(f"round {number} of {work.rounds}: direct {rates['direct']}, live {rates['live']}")
    return summary(taken)


def settings(config: Config, model: Path) -> dict[str, Any]:
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
    direct: Direct, live: Live, prompts: list[list[int]], tokens: int, others: list[list[int]]
) -> dict[str, Any]:
    with live.stopped():
        alone = direct.run(prompts, tokens)
    with direct.stopped():
        served = live.run(prompts, tokens)
        idle, busy = live.idle_handovers(others), live.busy_handovers(prompts, tokens, others)
    return {
        "direct": steady(alone),
        "live": steady(served),
        "same_outputs": sum(a == b for a, b in zip(alone["ids"], served["ids"], strict=True)),
        "idle": idle,
        "busy": busy,
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"{'round':8}{'direct tok/s':>14}{'live tok/s':>12}{'ratio':>8}{'direct step':>13}{'live step':>11}"]
    for number, (r, ratio) in enumerate(zip(found["rounds"], found["ratios"], strict=True), 1):
        direct, live = r["direct"], r["live"]
        steps = f"{direct['step_ms']:>10.1f} ms{live['step_ms']:>8.1f} ms"
        lines.append(f"{number:<8}{direct['tok_s']:>14.1f}{live['tok_s']:>12.1f}{ratio:>8.3f}{steps}")
    lines.append(f"median ratio {found['ratio']:.3f}; of CPU time a step {found['cpu_ratio']:.3f}")
    for state, taken in found["handover"].items():
        lines.append(
            f"hand-over, decode worker {state}: {taken['median_ms']:.0f} ms (at most {taken['max_ms']:.0f});"
            f" two steps + 10 ms are {taken['limit_ms']:.0f} ms"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main(prog_name="bench_overhead")
