"""tetri-cli predictor train: trains a length predictor on the files of `predictor collect`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli.options import COUNT, examples, json_option
from tetri.cli.predictor_scores import report_bad, shown
from tetri.paths import FILE, OUT_FOLDER

_EXAMPLES = examples("tetri-cli predictor train --lengths lengths.jsonl --kind hidden --out my-predictor")


@click.command("train", epilog=_EXAMPLES)
@click.option("--lengths", type=FILE, required=True, multiple=True, help="File that `collect` wrote; may be repeated.")
@click.option("--kind", type=click.Choice(["classifier", "hidden"]), default="hidden", show_default=True)
@click.option(
    "--out", type=OUT_FOLDER, required=True, help="The predictor's folder; writes its sub-folder for this kind."
)
@click.option("--model", metavar="NAME|FOLDER", help="Model of the lengths; required if the files do not name it.")
@click.option(
    "--encoder", metavar="NAME|FOLDER", help="classifier: encoder of the prompts (default: all-MiniLM-L6-v2)."
)
@click.option("--cut", type=click.IntRange(2), metavar="N",
              help="classifier: read at most N tokens of a prompt (default: 64).")  # fmt: skip
@click.option("--depth", type=COUNT, metavar="N",
              help="classifier: use the encoder's first N layers (default: two thirds).")  # fmt: skip
@click.option("--full", is_flag=True, help="classifier: train the encoder as well as the head.")
@click.option("--epochs", type=COUNT, default=4, show_default=True, help="Epochs of --full.")
@click.option("--layer", type=COUNT, metavar="N", help="hidden: read the states after N layers (default: the best).")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the split and the networks."
)
@json_option
def command(lengths: tuple[Path, ...], out: Path, as_json: bool, **how: Any) -> None:
    """Train a length predictor and evaluate it on held-out prompts (15 %). A classifier reads the prompt; hidden reads
    the target model's hidden states, which `collect --layers` keeps."""
    from tetri.predict.examples import read_texts
    from tetri.predict.lengths import PredictError
    from tetri.predict.train import train

    _check(how)
    try:
        texts = read_texts(lengths, states=how["kind"] == "hidden")
        report_bad(texts.bad)
        found = train(texts, _wanted(texts.plan, out, how), terminal.tell)
    except PredictError as error:
        raise click.ClickException(str(error)) from None
    terminal.print_json(found) if as_json else click.echo(shown(found))


def _check(how: dict[str, Any]) -> None:
    of = {"classifier": ("encoder", "cut", "depth", "full"), "hidden": ("layer",)}
    for kind, names in of.items():
        given = [name for name in names if how[name]]
        if given and kind != how["kind"]:
            raise click.UsageError(f"--{given[0]} is for --kind {kind}")


def _wanted(plan: dict[str, Any], out: Path, how: dict[str, Any]) -> Any:
    from tetri.models import find, weights_hash
    from tetri.predict.encoder import CUT, DEFAULT
    from tetri.predict.train import TrainSettings

    name, weights = str(plan.get("model", "")), str(plan.get("weights", ""))
    if how["model"]:
        given = weights_hash(find(how["model"]))
        if weights and given != weights:
            raise click.UsageError(f"--model {how['model']}: the lengths are of another model, {name}")
        name, weights = how["model"], given
    if not weights:
        raise click.UsageError("the lengths do not say whose they are: give --model")
    same = {name: how[name] for name in ("full", "seed", "epochs")}
    sizes: dict[str, Any] = {"cut": how["cut"] or CUT, "depth": how["depth"] or 0, "layer": how["layer"] or 0}
    encoder, date = _encoder(how["encoder"] or DEFAULT), time.strftime("%Y-%m-%d")
    return TrainSettings(how["kind"], out, Path(name).name, weights, encoder=encoder, date=date, **same, **sizes)


def _encoder(name: str) -> str:
    """Make a folder absolute, so that it is found from any working directory."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name
