"""bench_prediction: whether predicting output lengths pays, and with which policy: the live cores in the simulator.

Requests are drawn, with replacement, from texts that a model wrote in answer to prompts that no predictor was trained
on; --predictions is what `tetri-cli predictor eval` recorded of them, and --predictor the folder of that predictor, for
what a worker knows before any traffic. A text ends by itself, 1,024 tokens is all that a request says of its length.

Each row is a policy; each column what is predicted: `none` in seconds, the others as the difference to it in percent,
paired seed by seed, in brackets its 95 % interval (Student), bold where that holds no zero. A second table compares
all with the first policy, tetri's default, and no prediction: what policy and prediction gain together. Classifier,
both and noisy pay what the paper's predictor takes, beside the main model, by the cost table; a hidden state costs
nothing there, nor does an oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import click

from tetri import cost
from tetri.bench.plots import PlotError, ready
from tetri.bench.prediction.simulate import SETTINGS, TRAINED, Setting, Source, compared
from tetri.bench.prediction.tables import draw, tables
from tetri.bench.report import FILE, as_json, give, progress
from tetri.policy.rules import Rules
from tetri.predict.lengths import PredictError
from tetri.predict.model import SHIPPED
from tetri.sim.setup import SimError
from tetri.sim.texts import LIMIT, RecordedTextError


@click.command(epilog=" ".join((__doc__ or "").split("\n\n")[-1].split()))
@click.option("--predictions", "--lengths", type=FILE, required=True, help="JSONL of `predictor eval`.")
@click.option("--predictor", type=click.Path(file_okay=False, path_type=Path), default=SHIPPED / "smollm2-135m",
              help="Folder with the cards of that predictor.  [default: the shipped one for SmolLM2]")  # fmt: skip
@click.option("--setting", "names", multiple=True, type=click.Choice([each.name for each in SETTINGS]),
              help="Which, repeatable; all by default.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(2), default=6, show_default=True, help="Draws of the requests.")
@click.option("--cover", type=click.FloatRange(0, 1, max_open=True), default=Rules().length_cover, show_default=True,
              help="length_cover of the trained ones: 0, the likeliest range.")  # fmt: skip
@click.option("--reserve-share", type=click.FloatRange(0.01, 1), default=0.5, show_default=True,
              help="Share of the KV for requests that do not run yet.")  # fmt: skip
@click.option("--quick", is_flag=True, help="3 seeds, half of the requests and of the KV.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("--plot", type=FILE, help="PNG of the differences.")
@as_json
def main(
    predictions: Path, predictor: Path, names: Sequence[str], seeds: int, cover: float, reserve_share: float,
    quick: bool, workers: int, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Simulate what each length predictor gains with each admission policy and each dispatcher. All but the object
    "run" depends on the arguments only."""
    started = perf_counter()
    source, made = Source(predictions, predictor, cover, reserve_share), []
    settings, seeds = chosen(names, quick), 3 if quick else seeds
    try:
        if plot is not None:
            ready(plot)  # before all the work
        texts = source.texts()
        for kind in TRAINED:
            source.expected(kind)
        with get_context("spawn").Pool(workers) as pool:
            for setting in settings:
                made.append(compared(source, setting, seeds, pool.imap))
                progress(f"{setting.name}: {perf_counter() - started:.0f} s")
                if as_json:
                    progress(tables(made[-1]))
    except (SimError, RecordedTextError, PredictError, PlotError, cost.CostError) as error:
        raise click.UsageError(str(error)) from None
    if plot is not None:
        draw(plot, made)
    found = {
        "texts": len(texts),
        "longest_tokens": LIMIT,
        "cover": cover,
        "reserve_share": reserve_share,
        "settings": made,
        "run": {"wall_s": perf_counter() - started},
    }
    give(found, "\n\n".join(map(tables, made)), as_json)


def chosen(names: Sequence[str], quick: bool) -> list[Setting]:
    """All when there are no names."""
    settings = [each for each in SETTINGS if not names or each.name in names]
    if not quick:
        return settings
    return [replace(each, requests=each.requests // 2, kv_tokens=each.kv_tokens // 2) for each in settings]


if __name__ == "__main__":
    main(prog_name="bench_prediction")
