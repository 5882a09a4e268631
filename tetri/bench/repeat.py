"""repeat: count the greedy answers that depend on the company in the batch: each prompt alone, then among others.

    tools/bench_repeat --prompts 20 --batch 16

In float32 no answer should differ. In bfloat16 some may: docs/design.md says why. Exit status 1 when one in float32
does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tetri.bench.deployment import EXPECTED, LOAD_S, REPOSITORY, configured, own_folder, running
from tetri.bench.report import Program, Progress, as_json, conf, give, one_line, overrides, progress, table
from tetri.client import AsyncClient
from tetri.config import Config, default_path

DTYPES = ("float32", "bfloat16")
LICENCE = REPOSITORY / "LICENSE"
CHARS = 400  # of a prompt: some 90 tokens

Ids = list[int]


def prompts(count: int) -> list[str]:
    """Return `count` different prompts: pieces of LICENSE that begin at different places."""
    text = LICENCE.read_text(encoding="utf-8")
    return [text[at : at + CHARS] for at in range(0, count * 97, 97)]


def companies(count: int, batch: int) -> list[range]:
    """Return groups of `batch` prompts, or of all if there are fewer, that together have each prompt."""
    size = min(batch, count)
    starts = [*range(0, count - size, size), count - size]
    return [range(start, start + size) for start in starts]


def differing(alone: Sequence[Ids], together: Sequence[tuple[int, Ids]]) -> dict[int, int]:
    """Return the prompts with another answer in company, each with the index of the first token that differs.
    `together` has (prompt, answer) pairs."""
    found: dict[int, int] = {}
    for prompt, ids in together:
        if ids != alone[prompt]:
            same = [a == b for a, b in zip(ids, alone[prompt], strict=False)]
            first = same.index(False) if False in same else len(same)
            found[prompt] = min(first, found.get(prompt, first))
    return found


async def _asked(config: Config, texts: Sequence[str], batch: int, tokens: int) -> dict[int, int]:
    async with AsyncClient(config.clients_address, timeout=LOAD_S) as client:

        async def answer(text: str) -> Ids:
            return list((await client.generate(text, max_tokens=tokens, ignore_eos=True)).token_ids)

        alone = [await answer(text) for text in texts]
        together: list[tuple[int, Ids]] = []
        for group in companies(len(texts), batch):
            together += zip(group, await asyncio.gather(*(answer(texts[number]) for number in group)), strict=True)
    return differing(alone, together)


def measured(config: Config, texts: Sequence[str], batch: int, tokens: int, progress: Progress) -> dict[str, Any]:
    """Ask for each answer alone and in company. Raises LaunchError, ModelError and TetriError."""
    with running(config, progress, LOAD_S):
        found = asyncio.run(_asked(config, texts, batch, tokens))
    return {"prompts": len(texts), "differ": len(found), "first_token": dict(sorted(found.items()))}


@click.command(cls=Program)
@conf
@click.option("--prompts", "count", type=click.IntRange(2), default=20, show_default=True)
@click.option("--batch", type=click.IntRange(2), default=16, show_default=True, help="Requests at a time.")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="Output tokens of each.")
@overrides
@as_json
def main(
    conf: Path | None, count: int, batch: int, tokens: int, overrides: tuple[str, ...], as_json: bool
) -> None:  # fmt: skip
    """Count the greedy answers that differ between a request alone and the same request in company."""
    texts, made = prompts(count), {}
    with one_line("bench_repeat", *EXPECTED, status=2), own_folder("repeat") as folder:
        for dtype in DTYPES:
            config = configured(conf or default_path(), folder, "repeat", [*overrides, f"model.dtype={dtype}"])
            made[dtype] = measured(config, texts, batch, tokens, progress)
    ok = made["float32"]["differ"] == 0
    give({"batch": batch, "tokens": tokens, "ok": ok, "dtypes": made}, shown(made), as_json)
    sys.exit(0 if ok else 1)


def shown(made: dict[str, dict[str, Any]]) -> str:
    """Format the result as a table."""
    firsts = {dtype: each["first_token"].values() for dtype, each in made.items()}
    rows = [
        [dtype, f"{each['prompts']}", f"{each['differ']}", f"{min(firsts[dtype])}" if firsts[dtype] else "-"]
        for dtype, each in made.items()
    ]
    return table(("", "prompts", "differ", "earliest token"), rows)


if __name__ == "__main__":
    main(prog_name="bench_repeat")
