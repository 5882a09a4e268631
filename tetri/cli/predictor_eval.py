"""tetri-cli predictor eval: how good a predictor of output lengths is on prompts that it has not learnt from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tetri import atomic
from tetri.cli.predictor_scores import report_bad, shown

if TYPE_CHECKING:
    from tetri.predict.evaluate import Judged
    from tetri.predict.examples import Texts
    from tetri.predict.lengths import Length
    from tetri.predict.model import Loaded

FILE = click.Path(dir_okay=False, path_type=Path)
KINDS = ("classifier", "hidden")


@click.command("eval")
@click.option("--prompts", type=FILE, help="Judge on these prompts (all that have a length); `source` is used.")
@click.option(
    "--lengths", type=FILE, required=True, multiple=True, help='JSONL: {"prompt", "tokens"} a line; may be repeated.'
)
@click.option(
    "--predictor",
    type=click.Path(file_okay=False, path_type=Path),
    help="Its folder (the one shipped for the model of the lengths).",
)
@click.option("--kind", type=click.Choice([*KINDS, "both"]), help="Judge this kind only (all that can be).")
@click.option("--all", "seen_too", is_flag=True, help="Judge on prompts that it has learnt from, too.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
@click.option("--plot", type=FILE, help="Draw predicted against real lengths into this PNG.")
@click.option("--predictions", type=FILE, help="Write what was said of each text, for `sim`: JSONL.")
def command(
    prompts: Path | None,
    lengths: tuple[Path, ...],
    predictor: Path | None,
    kind: str | None,
    seen_too: bool,
    as_json: bool,
    plot: Path | None,
    predictions: Path | None,
) -> None:
    """Judge a predictor: accuracy in buckets of 100, 200 and 400 tokens, absolute error of the median, expected
    calibration error, Kendall's tau, beside the likeliest bucket, that of the prompt's source, and a regression on the
    prompt's length; from several texts a prompt also the ceiling. Hidden states lie beside the lengths."""
    from tetri.bench import length_plot, plots
    from tetri.predict.evaluate import ceiling_of, judge, report
    from tetri.predict.evaluate import predictions as rows_of
    from tetri.predict.examples import read_texts
    from tetri.predict.lengths import PredictError, states_path

    try:
        if plot:
            plots.ready()  # before all the work
        texts = read_texts(lengths, states=kind != "classifier" and all(states_path(file).exists() for file in lengths))
        report_bad(texts.bad)
        predictors = _predictors(predictor, kind, texts)
        judged_on, others = _chosen(texts, prompts, predictors, seen_too)
        judged = judge(predictors, texts, judged_on, lambda line: click.echo(line, err=True))
    except (PredictError, plots.PlotError) as error:
        raise click.ClickException(str(error)) from None
    found = report(judged, others, predictors) | {"not_judged": len(others), "ceiling": ceiling_of(texts)}
    if predictions:
        atomic.write_text(predictions, "".join(json.dumps(row) + "\n" for row in rows_of(judged)))
    if plot:
        length_plot.draw(plot, _points(judged), judged.tokens.tolist())
    click.echo(json.dumps(found) if as_json else shown(found))


def _predictors(folder: Path | None, kind: str | None, texts: Texts) -> dict[str, Loaded]:
    """By kind, those that can be judged. Raises PredictError."""
    from tetri.predict.card import CARD
    from tetri.predict.lengths import PredictError
    from tetri.predict.model import SHIPPED, load, shipped_for

    weights = str(texts.plan.get("weights", ""))
    if folder is None:
        folder = shipped_for(weights) if weights else next(iter(sorted(SHIPPED.glob("*"))), None)
    if folder is None:
        raise PredictError("no predictor is shipped for the model of these lengths: give --predictor")
    wanted: tuple[str, ...] = KINDS if kind in (None, "both") else (str(kind),)
    if kind is None:
        there = [one for one in wanted if (folder / one / CARD).exists()]
        wanted = tuple(one for one in there if one != "hidden" or texts.states) or tuple(there[:1]) or ("hidden",)
    if "hidden" in wanted and not texts.states:
        raise PredictError("the lengths have no hidden states beside them: collect with --layers, or --kind classifier")
    return {one: load(folder, one, weights) for one in wanted}


def _chosen(
    texts: Texts, prompts: Path | None, predictors: dict[str, Loaded], seen_too: bool
) -> tuple[list[Length], list[Length]]:
    """(first texts to judge on, all others). Raises PredictError."""
    from dataclasses import replace

    from tetri.predict.lengths import PredictError, prompt_key, read_prompts

    sources: dict[str, str] | None = None
    if prompts:
        found, bad = read_prompts(prompts)
        report_bad(bad)
        sources = {prompt.key: prompt.source for prompt in found}
    judged: list[Length] = []
    others: list[Length] = []
    seen = 0
    for length in texts.first():
        key = prompt_key(length.prompt)
        known = any(predictor.head.has_seen(key) for predictor in predictors.values())
        source = length.source or (sources or {}).get(key, "")
        here = sources is None or key in sources
        seen += known and here
        (judged if here and (seen_too or not known) else others).append(replace(length, source=source))
    if not judged and seen:
        raise PredictError(f"the predictor has learnt from all {seen} prompts: give others, or --all")
    if not judged:
        raise PredictError("none of the prompts has a length: collect theirs first")
    return judged, others


def _points(judged: Judged) -> dict[str, list[tuple[float, float, float]]]:
    """By kind, of each text the tokens below which 10, 50 and 90 % of the odds are."""
    from tetri.predict.scores import quantiles

    found = {}
    for kind, distribution in judged.distribution.items():
        low, middle, high = (
            quantiles(distribution, judged.width, share, judged.limit).tolist() for share in (0.1, 0.5, 0.9)
        )
        found[kind] = list(zip(low, middle, high, strict=True))
    return found
