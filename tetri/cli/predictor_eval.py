"""tetri-cli predictor eval: scores a length predictor on prompts that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tetri import atomic, terminal
from tetri.cli.options import examples, json_option
from tetri.cli.predictor_scores import report_bad, shown
from tetri.paths import FILE, FOLDER, OUT_FILE, OUT_PLOT

if TYPE_CHECKING:
    from tetri.predict.evaluate import Judged
    from tetri.predict.examples import Texts
    from tetri.predict.lengths import Length
    from tetri.predict.model import Loaded

KINDS = ("classifier", "hidden")
_EXAMPLES = examples("tetri-cli predictor eval --predictor my-predictor --lengths lengths.jsonl --plot seen.png")


@click.command("eval", epilog=_EXAMPLES)
@click.option("--prompts", type=FILE, help="Use these prompts only (default: all with a length); JSONL.")
@click.option("--lengths", type=FILE, required=True, multiple=True, help='JSONL, {"prompt", "tokens"} per line.')
@click.option("--predictor", type=FOLDER, help="The predictor's folder (default: the one shipped for the model).")
@click.option("--kind", type=click.Choice([*KINDS, "both"]), help="Evaluate it (default: as predictor.kind = auto).")
@click.option("--all", "seen_too", is_flag=True, help="Also use prompts that it was trained on.")
@json_option
@click.option("--plot", type=OUT_PLOT, help="Plot predicted and true lengths to this PNG.")
@click.option("--predictions", type=OUT_FILE, help="Write the predictions for each text to this JSONL file.")
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
    """Evaluate a predictor: by default the kind that a worker with predictor.kind = "auto" takes.

    Prints accuracy in buckets of 100, 200 and 400 tokens, absolute error of the median, expected calibration error and
    Kendall's tau, beside baselines: the likeliest bucket, that of the prompt's source, and a regression on the prompt's
    length. With several texts per prompt, also prints the ceiling of any predictor.
    """
    from tetri.bench import length_plot
    from tetri.predict.evaluate import ceiling_of, judge, report
    from tetri.predict.evaluate import predictions as rows_of
    from tetri.predict.examples import read_texts
    from tetri.predict.lengths import PredictError, states_path

    try:
        texts = read_texts(lengths, states=kind != "classifier" and all(states_path(file).exists() for file in lengths))
        report_bad(texts.bad)
        predictors, left_out = _predictors(predictor, kind, texts)
        for line in left_out:
            terminal.tell(line)
        judged_on, others = _chosen(texts, prompts, predictors, seen_too)
        judged = judge(predictors, texts, judged_on, terminal.tell)
    except PredictError as error:
        raise click.ClickException(str(error)) from None
    found = report(judged, others, predictors) | {"not_judged": len(others), "kinds_left_out": left_out}
    found["ceiling"] = ceiling_of(texts)
    terminal.print_json(found) if as_json else click.echo(shown(found))
    if predictions:
        atomic.write_text(predictions, "".join(json.dumps(row) + "\n" for row in rows_of(judged)))
    if plot:
        length_plot.draw(plot, _points(judged), judged.tokens.tolist())


def _predictors(folder: Path | None, kind: str | None, texts: Texts) -> tuple[dict[str, Loaded], list[str]]:
    """The predictors to evaluate, by kind, and a line about each kind that is left out. Raises PredictError."""
    from tetri.predict.lengths import PredictError
    from tetri.predict.model import SHIPPED, load, shipped_for

    weights = str(texts.plan.get("weights", ""))
    if folder is None:
        folder = shipped_for(weights) if weights else next(iter(sorted(SHIPPED.glob("*"))), None)
    if folder is None:
        raise PredictError("no predictor is shipped for the model of these lengths: give --predictor")
    if kind is None:
        predictors, left_out = _automatic(folder, weights)
    else:
        left_out = []
        predictors = {one: load(folder, one, weights) for one in (KINDS if kind == "both" else (kind,))}
    if "hidden" in predictors and not texts.states:
        raise PredictError("the lengths have no hidden states beside them: collect with --layers, or --kind classifier")
    return predictors, left_out


def _automatic(folder: Path, weights: str) -> tuple[dict[str, Loaded], list[str]]:
    """As `_predictors`, for the kind that a worker takes by itself. Raises PredictError."""
    from tetri.predict.card import CARD
    from tetri.predict.model import AUTO, load_first

    found, reasons = load_first(folder, AUTO, weights)
    left_out = [f"{kind} not judged: {reason}" for kind, reason in zip(AUTO, reasons, strict=False)]
    rest = (kind for kind in AUTO[len(reasons) + 1 :] if (folder / kind / CARD).exists())
    return {found.card.kind: found}, left_out + [f"{kind} not judged: --kind {kind}, or both" for kind in rest]


def _chosen(
    texts: Texts, prompts: Path | None, predictors: dict[str, Loaded], seen_too: bool
) -> tuple[list[Length], list[Length]]:
    """(texts to evaluate on, other texts); only the first text of each prompt. Raises PredictError."""
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
    """By kind, the predicted 10, 50 and 90 % quantiles of each text, in tokens."""
    from tetri.predict.scores import quantiles

    found = {}
    for kind, distribution in judged.distribution.items():
        low, middle, high = (
            quantiles(distribution, judged.width, share, judged.limit).tolist() for share in (0.1, 0.5, 0.9)
        )
        found[kind] = list(zip(low, middle, high, strict=True))
    return found
