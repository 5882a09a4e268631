"""tetri-cli predictor train and eval, from the files to what is printed."""

import json
import os
import shutil

import pytest
from click.testing import CliRunner

from tests.predict import made
from tetri import atomic
from tetri.cli.predictor_eval import command as eval_command
from tetri.cli.predictor_train import command as train_command
from tetri.predict import fit
from tetri.predict.card import CARD
from tetri.predict.examples import is_held_out, read_texts
from tetri.sim.texts import read


def run(command, *arguments, fails=False):
    found = CliRunner().invoke(command, [str(one) for one in arguments])
    assert (found.exit_code != 0) == fails, found.output
    return found


@pytest.fixture(scope="module", autouse=True)
def little_to_learn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "STEPS", 100)
        patch.setattr(fit, "RATE", 3e-3)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lengths in a.jsonl, both kinds of predictor in p; bare.jsonl has {"prompt", "tokens"} a line, nothing else."""
    folder = tmp_path_factory.mktemp("predictor")
    rows = [{"prompt": f"what is {number} and 7?", "tokens": 30 + number} for number in range(12)]
    (folder / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    file = made.lengths(folder / "a.jsonl", 120, layers=(1, 2))
    encoder = made.encoder(folder / "bert")
    found = run(train_command, "--lengths", file, "--out", folder / "p", "--json")
    assert json.loads(found.stdout)["kind"] == "hidden"
    how = ["--kind", "classifier", "--encoder", encoder, "--cut", "32"]
    found = run(train_command, "--lengths", file, "--out", folder / "p", *how)
    assert "likeliest of its source" in found.stdout and "classifier" in found.stdout
    return folder


def test_json_of_the_shape_that_others_read(folder):
    found = run(eval_command, "--lengths", folder / "a.jsonl", "--predictor", folder / "p", "--kind", "both", "--json")
    made_ = json.loads(found.stdout)
    assert set(made_) >= {"n", "acc", "majority", "by_length", "by_source", "mae", "ece", "tau", "ceiling", "later"}
    assert set(made_["acc"]) == {"100", "200", "400"} <= set(made_["majority"]) & set(made_["by_length"])
    assert set(made_["kinds"]) == {"classifier", "hidden", "both"}
    lengths = read_texts([folder / "a.jsonl"], states=False).first()
    held = sum(is_held_out(length, 0) for length in lengths)
    assert made_["n"] == held and made_["not_judged"] == 120 - held  # what it learnt from is left out
    assert made_["acc"]["100"] > made_["majority"]["100"]


def test_by_default_it_judges_what_a_worker_takes_and_names_the_rest(folder, tmp_path):
    """As tests/proc/test_predictor.py has it for a worker: hidden states, or else a classifier."""
    found = run(eval_command, "--lengths", folder / "a.jsonl", "--predictor", folder / "p", "--json")
    made_ = json.loads(found.stdout)
    assert (made_["kind"], list(made_["kinds"])) == ("hidden", ["hidden"])
    assert made_["kinds_left_out"] == ["classifier not judged: --kind classifier, or both"]
    assert made_["kinds_left_out"][0] in found.stderr
    shutil.copytree(folder / "p", tmp_path / "p")
    (tmp_path / "p" / "hidden" / "head.safetensors").write_bytes(b"cut")
    found = run(eval_command, "--lengths", folder / "a.jsonl", "--predictor", tmp_path / "p", "--json")
    made_ = json.loads(found.stdout)
    assert list(made_["kinds"]) == ["classifier"] and "is cut off" in made_["kinds_left_out"][0]
    assert made_["kinds_left_out"][0].startswith("hidden not judged: ") and len(made_["kinds_left_out"]) == 1


def test_other_prompts_than_those_learnt_from(folder, tmp_path):
    file = made.lengths(tmp_path / "b.jsonl", 300, layers=(1, 2), seed=5)
    prompts = tmp_path / "prompts.jsonl"
    wanted = [f"tell a long story about {number}" for number in range(201, 301, 2)]
    prompts.write_text("".join(json.dumps({"prompt": prompt, "source": "x"}) + "\n" for prompt in [*wanted, "unknown"]))
    arguments = ["--prompts", prompts, "--lengths", file, "--predictor", folder / "p", "--json"]
    assert json.loads(run(eval_command, *arguments).stdout)["n"] == 50


def test_lengths_of_a_stranger_need_no_states(folder):
    file = folder / "bare.jsonl"
    found = run(eval_command, "--lengths", file, "--predictor", folder / "p", fails=True)
    assert "no hidden states beside them: collect with --layers, or --kind classifier" in found.stderr
    found = run(eval_command, "--lengths", file, "--predictor", folder / "p", "--kind", "classifier", "--json")
    made_ = json.loads(found.stdout)
    assert (made_["n"], made_["kind"], list(made_["kinds"])) == (12, "classifier", ["classifier"])
    assert "bare.jsonl:13: not JSON" in found.stderr
    found = run(eval_command, "--lengths", file, "--predictor", folder / "p", "--kind", "hidden", fails=True)
    assert "collect with --layers" in found.stderr


def test_a_picture_and_what_the_simulator_reads(folder, tmp_path):
    files = ["--plot", tmp_path / "p.png", "--predictions", tmp_path / "p.jsonl"]
    files += ["--kind", "both"]
    found = run(eval_command, "--lengths", folder / "a.jsonl", "--predictor", folder / "p", *files)
    assert "upper bound for 90% by hidden" in found.stdout and "what remains" in found.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")
    texts = read(tmp_path / "p.jsonl", 256)
    assert texts and all(text.classifier and text.follows[0][0] == 0 for text in texts)


def test_the_scores_are_shown_although_a_file_fails(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "write_text", lambda path, text: os.stat("/nowhere"))
    arguments = ["--lengths", folder / "a.jsonl", "--predictor", folder / "p", "--predictions", tmp_path / "p.jsonl"]
    found = run(eval_command, *arguments, fails=True)
    assert "upper bound for 90% by hidden" in found.stdout and isinstance(found.exception, FileNotFoundError)


def test_only_what_was_learnt_from(folder, tmp_path):
    lengths = read_texts([folder / "a.jsonl"], states=False).first()
    prompts = tmp_path / "prompts.jsonl"
    learnt = [length.prompt for length in lengths if not is_held_out(length, 0)]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in learnt))
    arguments = ["--prompts", prompts, "--lengths", folder / "a.jsonl", "--predictor", folder / "p"]
    assert "has learnt from all" in run(eval_command, *arguments, fails=True).stderr
    assert json.loads(run(eval_command, *arguments, "--all", "--json").stdout)["n"] == len(learnt)


@pytest.mark.parametrize(
    ("file", "arguments", "says"),
    [
        ("a.jsonl", "--kind hidden --full", "--full is for --kind classifier"),
        ("a.jsonl", "--kind classifier --layer 3", "--layer is for --kind hidden"),
        ("a.jsonl", "--kind hidden --layer 7", "layer 7 was not kept"),
        ("bare.jsonl", "--kind classifier", "give --model"),
    ],
)
def test_what_cannot_be_trained(folder, tmp_path, file, arguments, says):
    found = run(train_command, "--lengths", folder / file, "--out", tmp_path, *arguments.split(), fails=True)
    assert says in found.stderr
    assert not list(tmp_path.rglob(CARD))


def test_a_predictor_that_fails_leaves_no_folder(folder, tmp_path):
    out = tmp_path / "new" / "er"
    run(train_command, "--lengths", folder / "a.jsonl", "--layer", 7, "--out", out, fails=True)
    assert not list(tmp_path.iterdir())


def test_a_predictor_of_another_model(folder, tmp_path):
    for name in ("a.jsonl", "a.jsonl.states", "a.jsonl.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes().replace(b"weights-of-tiny", b"weights-of-some"))
    arguments = ["--lengths", tmp_path / "a.jsonl", "--predictor", folder / "p"]
    assert "for another model" in run(eval_command, *arguments, fails=True).stderr
    assert "no predictor is shipped" in run(eval_command, *arguments[:2], fails=True).stderr
