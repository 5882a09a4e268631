"""tools/bench_prediction: the same requests for all, what it compares, what it shows, and the shape of it in small."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import click
import pytest

from tetri import cost
from tetri.bench.prediction import __main__ as program
from tetri.bench.prediction import simulate as prediction
from tetri.bench.prediction import tables as prediction_tables
from tetri.predict.card import Card, write_card

REPOSITORY = Path(__file__).parents[2]
WIDTH, BUCKETS = 100, 11
SMALL = prediction.Setting("small", "admit", ("peak",), 24, 4500, 2, 1)


def sure(tokens):
    label = min(tokens // WIDTH, BUCKETS - 1)
    return [0.9 if place == label else 0.01 for place in range(BUCKETS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Most texts are short, though all may be long; the predictors name the right bucket."""
    folder, rng = tmp_path_factory.mktemp("predictor"), Random(3)
    lines = []
    for _ in range(60):
        prompt, output = rng.randint(20, 300), rng.choice((30, 60, 150, 300, 1024))
        later = {str(known): sure(output - known) for known in range(64, output, 64)}
        row = {"prompt_tokens": prompt, "tokens": output, "width": WIDTH, "source": "", "later": later}
        lines.append(json.dumps(row | {"classifier": sure(output), "hidden": sure(output)}))
    (folder / "predictions.jsonl").write_text("\n".join(lines))
    for kind in ("classifier", "hidden"):
        (folder / kind).mkdir()
        write_card(Card(kind, "none", "none", WIDTH, (1 / BUCKETS,) * BUCKETS, (), ""), folder / kind)
    return prediction.Source(folder / "predictions.jsonl", folder)


@pytest.fixture(scope="module")
def point(source):
    return prediction.compared(source, SMALL, 2, map)


def row(point, policy, kind):
    return next(row for row in point["rows"] if (row["policy"], row["length"]) == (policy, kind))


def test_every_policy_has_every_predictor_beside_none(point):
    assert [(each["policy"], each["length"]) for each in point["rows"]] == [
        (policy, kind) for policy in SMALL.policies for kind in prediction_tables.KINDS
    ]
    for each in point["rows"]:
        assert bool(each["against_none"]) == (each["length"] != "none")
        assert each["against_plain"] == each["against_none"]  # with one policy
        assert ("right" in each) == (each["length"] in prediction.TRAINED)


def test_some_predictors_alone_need_no_predictions_of_the_others(tmp_path, source):
    texts = tmp_path / "lengths.jsonl"
    texts.write_text('{"prompt_tokens": 20, "tokens": 30, "width": 100}\n')
    point = prediction.compared(replace(source, predictions=texts), SMALL, 2, map, ("none", "prior"))
    assert [each["length"] for each in point["rows"]] == ["none", "prior"]
    shown = prediction_tables.tables(point)
    assert all(len(line.split("|")) == 5 for line in shown.splitlines() if "|" in line)
    prediction_tables.draw(tmp_path / "x.png", [point])


def test_greedy_admission_on_one_instance_asks_nobody(source):
    none, oracle = (prediction.run((source, SMALL, "greedy", kind, 0))["jct_mean"] for kind in ("none", "oracle"))
    assert none == pytest.approx(oracle)


def test_peak_gains_for_without_a_prediction_it_gives_each_request_room_for_the_limit(point):
    for kind in ("classifier", "hidden", "both", "oracle"):
        assert row(point, "peak", kind)["jct_mean"] < 0.9 * row(point, "peak", "none")["jct_mean"]
    assert row(point, "peak", "hidden")["right"] > 0.8 * row(point, "peak", "hidden")["scored"] > 0


def test_differences_are_paired_by_seed(point, source):
    none, oracle = (
        [prediction.run((source, SMALL, "peak", kind, seed))["jct_p95"] for seed in range(2)]
        for kind in ("none", "oracle")
    )
    found = row(point, "peak", "oracle")["against_none"]["jct_p95"]
    assert found["seconds"]["mean"] == pytest.approx(sum(oracle) / 2 - sum(none) / 2)
    assert found["share"]["mean"] == pytest.approx((oracle[0] / none[0] + oracle[1] / none[1]) / 2 - 1)


def test_what_is_predicted_changes_no_request(source):
    setting = replace(SMALL, load=1.0)
    assert prediction.run((source, setting, "greedy", "none", 1)) == prediction.run(
        (source, setting, "greedy", "none", 1)
    )
    paid, free = (prediction.run((source, setting, "greedy", kind, 1)) for kind in ("classifier", "hidden"))
    assert paid["ttft_mean"] > free["ttft_mean"]
    assert free["ttft_mean"] == prediction.run((source, setting, "greedy", "none", 1))["ttft_mean"]


def test_the_rate_fills_the_kv(source):
    """Twice the memory serves more, but not twice as much: steps take longer."""
    table, texts = cost.load(prediction.COST), source.texts()
    one, two = (prediction.full_rate(texts, table, kv) for kv in (10_000, 20_000))
    assert one < two < 2 * one


@pytest.mark.parametrize(
    ("low", "high", "says"), [(-0.2, -0.1, "pays"), (0.1, 0.2, "costs"), (-0.1, 0.1, ""), (1e-12, 1e-11, "")]
)
def test_the_verdict_is_the_intervals(low, high, says):
    share = {"mean": (low + high) / 2, "low": low, "high": high}
    made = {"against_none": {"jct_mean": {"share": share}}}
    assert prediction_tables.verdict(made, "jct_mean") == says
    assert prediction_tables.verdict({"against_none": {}}, "jct_mean") == ""


def test_tables_and_picture(point, tmp_path):
    shown = prediction_tables.tables(point)
    assert "### small" in shown and "| peak | " in shown and "24 requests, all at once" in shown
    assert all(len(line.split("|")) == len(prediction_tables.KINDS) + 3 for line in shown.splitlines() if "|" in line)
    prediction_tables.draw(tmp_path / "x.png", [point])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_kinds_without_predictions_are_left_out_and_named(source, capsys):
    texts, bare = source.texts(), [replace(text, classifier=None) for text in source.texts()]
    assert program.judged((), texts) == ([*prediction_tables.KINDS[1:]], []) and capsys.readouterr().err == ""
    assert program.judged((), bare) == (["prior", "hidden", "noisy", "oracle"], ["classifier", "both"])
    assert "classifier left out: the predictions have none: tetri-cli predictor eval" in capsys.readouterr().err
    assert program.judged(("hidden",), bare) == (("hidden",), [])
    with pytest.raises(click.UsageError, match="--kind both: the predictions have none"):
        program.judged(("both",), bare)


@pytest.mark.parametrize(
    ("option", "says"), [("--predictions", "cannot be read"), ("--predictor", "no hidden predictor in")]
)
def test_a_file_that_is_not_there_is_one_line(option, says, source):
    given = {"--predictions": source.predictions, "--predictor": source.predictor, option: "/nowhere"}
    command = [REPOSITORY / "tools" / "bench_prediction", *(str(each) for pair in given.items() for each in pair)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr.splitlines()[-1]
