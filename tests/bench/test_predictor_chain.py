"""tools/predictor_chain: what it draws, how it judges, and how it ends. The whole of it takes minutes."""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tetri.bench import predictor_chain
from tetri.bench.predictor_chain import Chain, StepError, Wanted
from tetri.client import Result
from tetri.request import Receipt, Usage

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {i}", "source": "s"}) + "\n" for i in range(30)) + "bad\n")
    return path


def wanted(prompts, count=20, requests=10, seed=0):
    return Wanted(prompts, count, requests, "smollm2-135m", 1024, seed)


def test_what_is_served_is_not_what_is_learnt_from(prompts):
    learnt, others = predictor_chain.drawn(wanted(prompts))
    assert len(learnt) == 20 and len({prompt.text for prompt in learnt + others}) == 30
    assert (learnt, others) == predictor_chain.drawn(wanted(prompts))
    assert learnt != predictor_chain.drawn(wanted(prompts, seed=1))[0]


def test_too_few_prompts_are_said_before_anything_is_done(prompts):
    with pytest.raises(StepError, match="has 30 and 1 bad lines: 21 to learn from and 10 to serve are needed"):
        predictor_chain.drawn(wanted(prompts, 21))


def result(*tokens):
    return Result("r", "text", list(tokens), "stop", Usage(3, len(tokens)), {}, 0.1, 0.2, Receipt(None, None))


def test_an_answer_or_a_prediction_that_is_missing_fails():
    counts = {"predicted": 2, "late": 1, "right": 0, "inside": 2, "kind": "both"}
    said = predictor_chain.judged([result(1, 2), result(3)], [counts])
    assert said == "2 requests, 3 tokens; 2 predicted, 1 late, 0 right, 2 inside"
    with pytest.raises(StepError, match="1 of 2 requests were not answered"):
        predictor_chain.judged([result(1), result()], [counts])
    with pytest.raises(StepError, match="2 of 3 requests had a prediction"):
        predictor_chain.judged([result(1)] * 3, [counts])


def test_each_step_hands_its_files_on_and_the_failing_one_is_named(prompts, tmp_path, monkeypatch):
    calls = []

    def commands(*lines):
        calls.append([(line[0], list(zip(line[1::2], line[2::2], strict=True))) for line in lines])
        if lines[0][0] == "eval":
            raise StepError("exit status 2, see above")
        acc = {"100": 0.3, "200": 0.456, "400": 0.7}
        collected = [{"texts": 20 * n, "mean": 300.0 * n, "cut": n} for n in (1, 2)]
        return collected[: len(lines)] if lines[0][0] == "collect" else [{"n": 3, "acc": acc, "tau": 0.4}]

    monkeypatch.setattr(predictor_chain, "commands", commands)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 5})
    folder = tmp_path / "made"
    folder.mkdir()
    chain = Chain(wanted(prompts), folder)
    with pytest.raises(StepError, match="evaluate: exit status 2, see above"):
        chain.run()
    names = ["collect", *(f"train {kind}" for kind in predictor_chain.KINDS)]
    assert [step["step"] for step in chain.steps] == names
    assert chain.steps[0]["result"] == "60 texts, 500 tokens in the mean, 3 cut off"
    assert chain.steps[1]["result"] == "on 3 held out, right at 100, 200, 400: 0.30 / 0.46 / 0.70; tau 0.40"
    parts, train = [dict(options) for _, options in calls[0]], calls[1][0][1]
    assert [value for name, value in train if name == "--lengths"] == [part["--out"] for part in parts]
    assert [part["--cpus"] for part in parts] == ["1,5", "2"]
    assert dict(calls[-1][0][1])["--predictor"] == dict(train)["--out"]
    learnt = [json.loads(line)["prompt"] for part in parts for line in Path(part["--prompts"]).read_text().splitlines()]
    assert sorted(learnt) == sorted(prompt.text for prompt in predictor_chain.drawn(wanted(prompts))[0])


def test_the_last_line_of_a_failed_command_is_told(tmp_path, capfd):
    missing = ["eval", "--lengths", str(tmp_path / "nothing")]
    with pytest.raises(StepError, match="exit status 2, see above"):
        predictor_chain.commands(missing)
    assert "nothing: No such file" in capfd.readouterr().err
    with pytest.raises(StepError, match="exit status 2: tetri-cli: .*nothing: No such file"):
        predictor_chain.commands(["eval", "--help"], missing)


def ended(process):
    said, err = process.communicate(timeout=60)
    assert not list(Path("/tmp").glob(f"tetri-chain-{process.pid}-*"))
    assert "Traceback" not in err
    return process.returncode, said, err


def started(*arguments):
    command = [REPOSITORY / "tools" / "predictor_chain", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")


def test_a_failed_chain_is_one_line_and_leaves_nothing(prompts):
    status, said, err = ended(started("--prompts", prompts, "--json"))
    assert status == 1 and json.loads(said)["steps"] == [] and err.count("\n") == 1
    assert err.startswith("predictor_chain: prompts: ") and json.loads(said)["problem"] in err


def test_an_interrupted_chain_leaves_nothing(tmp_path):
    slow = tmp_path / "slow"
    os.mkfifo(slow)
    process = started("--prompts", slow)
    opened = threading.Event()

    def feed():
        with slow.open("w"):  # waits for the reader
            opened.set()
            process.wait()

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert opened.wait(60)
    process.send_signal(signal.SIGINT)
    status, said, err = ended(process)
    feeder.join()
    assert status == 130 and said.splitlines()[1].startswith("all ")
    assert err == "predictor_chain: interrupted; everything is stopped\n"
