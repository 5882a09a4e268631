"""tetri-cli predictor collect: with a played writer. The real one: tests/engine/vllm/test_writer.py."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import make_checkpoint
from played_writer import PlayedWriter

from tetri.cli import predictor_collect
from tetri.predict.lengths import read_lengths, read_states, states_path

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of thirty layers, as far as it is looked at before vLLM starts."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), ["x"], chat_template=TEMPLATE)
    shape = {"max_position_embeddings": 80, "vocab_size": 300, "num_hidden_layers": 30}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def files(tmp_path):
    """--prompts and --out."""
    lines = [json.dumps({"prompt": f"number {i}", "source": "s"}) for i in range(12)]
    lines[3:3] = ["nonsense", json.dumps({"prompt": "long" * 30})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]


@pytest.fixture
def out(files):
    return Path(files[3])


@pytest.fixture
def run(run, model, files, monkeypatch):
    """Run the command in this process: (exit status, stdout, stderr). `run.writers` were asked for."""

    make = predictor_collect._writer

    def played(target, batch, longest, leaving):
        def start(folder, **fields):
            writer = PlayedWriter(target.plan.max_tokens, fields["every"], fields["context"])
            writer.started = folder, fields
            return writer

        monkeypatch.setitem(sys.modules, "tetri.engine.vllm.writer", SimpleNamespace(Writer=start))
        run_cli.writers.append((target.plan, batch, writer := make(target, batch, longest, leaving)))
        return writer

    run_cli = partial(run, "predictor", "collect", *files, "--model", model, "--max-tokens", "40")
    run_cli.writers = []
    monkeypatch.setattr(predictor_collect, "_writer", played)
    monkeypatch.setattr(predictor_collect, "gc", SimpleNamespace(collect=int, freeze=int))  # of all that tests have
    return run_cli


def test_bad_lines_are_told_and_everything_else_is_collected(run, files, out):
    status, said, err = run()
    assert status == 0
    assert err.splitlines() == [
        f"skipped: {files[1]}:4: not JSON",
        f"skipped: {files[1]}: line 5: 122 prompt tokens, the model's context leaves room for 40",
        "0 of 12 texts are there; starting vLLM",
        *[line for line in err.splitlines() if line.startswith("12 of 12 texts, ") and line.endswith(", 0 s left")],
    ]
    lengths, bad = read_lengths(out)
    tokens, cut = sum(x.tokens for x in lengths), sum(x.ended == "length" for x in lengths)
    assert len(lengths) == 12 and bad == []
    assert said.splitlines()[:2] == [
        f"{out}: 12 texts, 12 of them new; 2 lines skipped",
        f"{tokens / 12:.0f} tokens on average; {cut} were cut off by --max-tokens",
    ]
    assert said.splitlines()[2].startswith(f"{tokens} tokens in 0 s, ")
    assert run.writers[0][0].layers == (10, 16, 22) and run.writers[0][2].context == 11 + 40


def test_json_is_one_object_and_a_second_run_has_nothing_to_do(run, out):
    run("--limit", "5", "--samples", "2")
    status, said, err = run("--limit", "5", "--samples", "2", "--json")
    found = json.loads(said)
    assert status == 0 and said.count("\n") == 1 and len(run.writers) == 1 and "starting" not in err
    lengths, _ = read_lengths(out)
    assert found == {
        "mean": sum(length.tokens for length in lengths) / 10,
        "cut": sum(length.ended == "length" for length in lengths),
        **{"out": str(out), "prompts": 5, "skipped": 2, "texts": 10, "written": 0, "left": 0},
        **{"tokens": 0, "seconds": 0.0},
    }


def test_options_reach_the_writer(run, model):
    numbers = {"every": 5, "batch": 3, "temperature": 0, "seed": 9, "limit": 6}
    run("--layers", "2,1", "--dtype", "float32", *(word for k, v in numbers.items() for word in (f"--{k}", str(v))))
    plan, batch, writer = run.writers[0]
    assert (plan.layers, plan.every, plan.temperature, plan.seed, plan.dtype) == ((1, 2), 5, 0.0, 9, "float32")
    assert batch == 3 == writer.most and len(writer.added) == 6
    assert {sampling.temperature for _, sampling in writer.added.values()} == {0.0}
    fields = {"dtype": "float32", "batch": 3, "context": 10 + 40, "kv_bytes": 3 << 30, "layers": (1, 2), "every": 5}
    assert writer.started == (model, fields)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--layers", "ten"], "--layers takes numbers such as 10,16,22, or none"),
        (["--layers", "31"], "the model has layers 1 to 30"),
        (["--layers", "0,3"], "the model has layers 1 to 30"),
        (["--max-tokens", "80"], "the model's context is 80 tokens"),
        (["--max-tokens", "79"], "has no prompt that can be used"),
        (["--model", "nothing"], "unknown model 'nothing'"),
        (["--out", "/no/such/folder/x"], "--out: there is no folder /no/such/folder"),
        (["--prompts", "/no/such"], "/no/such: No such file or directory"),
        (["--cpus", "x"], "cpus = 'x': must be CPU numbers such as"),
        (["--cpus", "9999"], "cpus = '9999': this process may use CPU"),
        (["--samples", "0"], "--samples"),
        (["--temperature", "-1"], "--temperature"),
        (["--every", "0"], "--every"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(run, out, more, says):
    status, said, err = run(*more)
    assert (status, said) == (2, "") and not run.writers
    last = err.splitlines()[-1]
    assert last.startswith("tetri-cli: ") and says in last
    assert all(line.startswith("skipped: ") for line in err.splitlines()[:-1]) and not out.exists()


def test_many_bad_lines_are_counted(run, files):
    with open(files[1], "a") as file:
        file.write("\nbad" * 50)
    err = run()[2].splitlines()
    assert sum(line.startswith("skipped: ") for line in err) == 21 and "skipped: 32 more lines" in err


def test_a_full_disk_is_one_line(run, out, monkeypatch):
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, most))
    try:
        status, said, err = run("--layers", "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    advice = "the written part is kept; free some space and run the same command again"
    assert (status, said) == (1, "") and err.splitlines()[-1] == f"tetri-cli: {out}: File too large; {advice}"
    assert run("--layers", "none")[0] == 0 and len(read_lengths(out)[0]) == 12
    assert not states_path(out).exists() and {plan.layers for plan, *_ in run.writers} == {()}


@pytest.mark.parametrize(
    ("texts", "total", "spent", "words"),
    [(0, 9, 50, "0 s left"), (10, 20, 40, "40 s left"), (1, 3, 60, "2 min left"), (1, 201, 36, "2.0 h left")],
)
def test_the_time_left(texts, total, spent, words):
    assert predictor_collect.time_left(texts, total, spent) == words


PLAYED = """
import os, sys, time
sys.path.insert(0, {tests!r})
from played_writer import PlayedWriter
from tetri import cli
from tetri.cli import predictor_collect

def step(number):
    if number == int(os.environ["WAITS_AT"]):
        os.write(1, b"waits\\n")  # not through a bar
        time.sleep(60)

predictor_collect._writer = lambda target, batch, longest, leaving: PlayedWriter(
    target.plan.max_tokens, target.plan.every, longest + target.plan.max_tokens, at_step=step
)
cli.main()
"""


@pytest.fixture
def command(model, files):
    """Runs the command to its end, in a process of its own; `halfway` starts it and waits until it is there."""
    program = PLAYED.format(tests=str(REPOSITORY / "tests"))
    arguments = ["predictor", "collect", *files, "--model", str(model), "--max-tokens", "40", "--batch", "3"]
    settings = {"args": [sys.executable, "-c", program, *arguments], "stdout": subprocess.PIPE, "text": True}

    def command():
        environment = {**os.environ, "WAITS_AT": "0"}
        return subprocess.run(**settings, stderr=subprocess.PIPE, timeout=30, env=environment)

    def halfway(stderr):
        begun = subprocess.Popen(**settings, stderr=stderr, env={**os.environ, "WAITS_AT": "60"})
        ending.callback(begun.communicate, timeout=30)
        ending.callback(begun.kill)
        assert begun.stdout.readline() == "waits\n"
        return begun

    command.halfway = halfway
    with contextlib.ExitStack() as ending:
        yield command


def test_an_interrupt_keeps_everything_and_the_same_command_goes_on(command, out):
    process = command.halfway(subprocess.PIPE)
    second = command()
    assert second.returncode == 2 and f"another collect is writing {out}: wait for its end" in second.stderr
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=30)
    there = len(read_lengths(out)[0])
    assert process.returncode == 130 and 0 < there < 12
    assert err.splitlines()[-1] == (
        f"interrupted: all that is written stays in {out}; the same command goes on from there"
    )
    assert f"{12 - there} texts are left: what is there has too many short ones" in said
    again = command()
    assert again.returncode == 0 and f"12 texts, {12 - there} of them new" in again.stdout
    assert len(read_lengths(out)[0]) == 12 == len(read_states(states_path(out)))


def test_a_terminal_gets_a_bar(command):
    end, terminal = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(everything, end)
        process = command.halfway(terminal)
        os.close(terminal)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        for part in ("collecting", "━", "tokens/s", " left"):
            assert part in shown.result(timeout=30)


def everything(end):
    """That is written to the other end of a pseudo terminal until it is closed."""
    pieces = []
    with contextlib.suppress(OSError):  # closed
        while piece := os.read(end, 4096):
            pieces.append(piece)
    os.close(end)
    return b"".join(pieces).decode()
