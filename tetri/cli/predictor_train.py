"""tetri-cli predictor train: a predictor of output lengths, from lengths that `collect` wrote."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from tetri.cli.predictor_scores import report_bad, shown

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("train")
@click.option("--lengths", type=FILE, required=True, multiple=True, help="Of `collect`; may be repeated.")
@click.option("--kind", type=click.Choice(["classifier", "hidden"]), default="hidden", show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The predictor's folder; of it the sub-folder of this kind is written.",
)
@click.option("--model", metavar="NAME|FOLDER", help="Whose lengths they are, where the lengths do not say.")
@click.option("--encoder", metavar="NAME|FOLDER", help="classifier: read prompts with this (all-MiniLM-L6-v2).")
@click.option("--cut", type=click.IntRange(2), metavar="N", help="classifier: read so many tokens of a prompt at most.")
@click.option("--depth", type=click.IntRange(1), metavar="N", help="classifier: compute the encoder's first N layers.")
@click.option("--full", is_flag=True, help="classifier: train the encoder, too, not only the head.")
@click.option("--epochs", type=click.IntRange(1), default=4, show_default=True, help="With --full.")
@click.option("--layer", type=click.IntRange(1), metavar="N", help="hidden: the states after N layers (the best ones).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the split and the networks.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def command(lengths: tuple[Path, ...], out: Path, as_json: bool, **how: Any) -> None:
    """Train a predictor of output lengths and judge it on the prompts that were held out (15 %). A classifier reads
    the prompt; hidden reads the target model's own hidden states, which `collect --layers` keeps."""
    from tetri.predict.examples import read_texts
    from tetri.predict.lengths import PredictError
    from tetri.predict.train import train

    _check(how)
    try:
        texts = read_texts(lengths, states=how["kind"] == "hidden")
        report_bad(texts.bad)
        out.mkdir(parents=True, exist_ok=True)
        found = train(texts, _wanted(texts.plan, out, how), lambda line: click.echo(line, err=True))
    except PredictError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(found) if as_json else shown(found))


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
    return TrainSettings(
        how["kind"],
        out,
        Path(name).name,
        weights,
        encoder=_encoder(how["encoder"] or DEFAULT),
        full=how["full"],
        cut=how["cut"] or CUT,
        depth=how["depth"] or 0,
        layer=how["layer"] or 0,
        seed=how["seed"],
        epochs=how["epochs"],
        date=time.strftime("%Y-%m-%d"),
    )


def _encoder(name: str) -> str:
    """A folder as it can be found from anywhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name
