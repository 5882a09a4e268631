"""bench_prediction: simulate how much each length predictor helps with each policy, using the live cores.

Requests are drawn with replacement from recorded answers of a model to prompts outside the training set. --predictions
has the recorded predictions of `tetri-cli predictor eval`; --predictor is the folder of that predictor, whose cards say
what a worker knows before any traffic. Texts end by themselves; every request has max_tokens 1,024.

Each row is a policy and each column a predictor (--kind): `none` in seconds, the others as the difference to it in
percent, paired by seed, with the 95 % interval (Student's t) in brackets; bold if the interval excludes zero. A second
table compares all with the first policy, tetri's default, without prediction. Classifier, both and noisy take the time
of the paper's predictor from the cost table, in parallel with the main model; hidden states and the oracle take no
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from tetri import cost
from tetri.bench.prediction.simulate import SETTINGS, TRAINED, Setting, Source, compared
from tetri.bench.prediction.tables import KINDS, draw, tables
from tetri.bench.report import Program, as_json, give, progress
from tetri.paths import FILE, FOLDER, OUT_PLOT
from tetri.policy.rules import Rules
from tetri.predict.lengths import PredictError
from tetri.predict.model import SHIPPED
from tetri.sim.setup import SimError
from tetri.sim.texts import LIMIT, RecordedText, RecordedTextError


@click.command(cls=Program, epilog=" ".join((__doc__ or "").split("\n\n")[-1].split()))
@click.option("--predictions", "--lengths", type=FILE, required=True,
              help="JSONL of `tetri-cli predictor eval --kind both`.")  # fmt: skip
@click.option("--predictor", type=FOLDER, default=SHIPPED / "smollm2-135m",
              help="Folder of that predictor.  [default: the shipped one for SmolLM2]")  # fmt: skip
@click.option("--setting", "names", multiple=True, type=click.Choice([each.name for each in SETTINGS]),
              help="May be repeated. Default: all.")  # fmt: skip
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS[1:]),
              help="May be repeated. Default: all that the predictions have.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(2), default=6, show_default=True, help="Draws of the requests.")
@click.option("--cover", type=click.FloatRange(0, 1, max_open=True), default=Rules().length_cover, show_default=True,
              help="length_cover of the trained predictors; 0: the likeliest range.")  # fmt: skip
@click.option("--reserve-share", type=click.FloatRange(0.01, 1), default=0.5, show_default=True,
              help="Share of the KV for requests that are not running yet.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Use 3 seeds, half of the requests and half of the KV.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Number of processes.")
@click.option("--plot", type=OUT_PLOT, help="Write a PNG of the differences.")
@as_json
def main(
    predictions: Path, predictor: Path, names: Sequence[str], kinds: Sequence[str], seeds: int, cover: float,
    reserve_share: float, quick: bool, workers: int, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Simulate the gain of each length predictor with each admission policy and dispatcher. Only the object "run"
    differs between two runs."""
    started = perf_counter()
    source, made = Source(predictions, predictor, cover, reserve_share), []
    settings, seeds = chosen(names, quick), 3 if quick else seeds
    try:
        texts = source.texts()
        kinds, left_out = judged(kinds, texts)
        for kind in (each for each in kinds if each in TRAINED):
            source.expected(kind)
        with get_context("spawn").Pool(workers) as pool:
            for setting in settings:
                made.append(compared(source, setting, seeds, pool.imap, ("none", *kinds)))
                progress(f"{setting.name}: {perf_counter() - started:.0f} s")
                if as_json:
                    progress(tables(made[-1]))
    except (SimError, RecordedTextError, PredictError, cost.CostError) as error:
        raise click.UsageError(str(error)) from None
    found: dict[str, Any] = {"texts": len(texts), "longest_tokens": LIMIT, "cover": cover}
    found |= {"reserve_share": reserve_share, "left_out": left_out, "settings": made}
    found["run"] = {"wall_s": perf_counter() - started}
    give(found, "\n\n".join(map(tables, made)), as_json)
    if plot is not None:
        draw(plot, made)


def judged(kinds: Sequence[str], texts: Sequence[RecordedText]) -> tuple[Sequence[str], list[str]]:
    """The kinds to compare, and those that are left out because no prediction of them is recorded. Raises UsageError if
    such a kind is named."""
    lacking = {"classifier"} if any(text.classifier is None for text in texts) else set()
    lacking |= set() if all(text.follows for text in texts) else {"hidden"}
    left_out = [kind for kind in KINDS if kind in lacking or (kind == "both" and lacking)]
    why = "the predictions have none: tetri-cli predictor eval --kind both"
    if named := [kind for kind in kinds if kind in left_out]:
        raise click.UsageError(f"--kind {named[0]}: {why}")
    if kinds:
        return kinds, []
    for kind in left_out:
        progress(f"{kind} left out: {why}")
    return [kind for kind in KINDS[1:] if kind not in left_out], left_out


def chosen(names: Sequence[str], quick: bool) -> list[Setting]:
    """Return the settings with these names, all without names; halved if `quick`."""
    settings = [each for each in SETTINGS if not names or each.name in names]
    if not quick:
        return settings
    return [replace(each, requests=each.requests // 2, kv_tokens=each.kv_tokens // 2) for each in settings]


if __name__ == "__main__":
    main(prog_name="bench_prediction")
