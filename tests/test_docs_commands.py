"""Every command in README.md and docs/ is run as it stands there: on emulated engines, beside a deployment of the tests' own.
What needs a model, minutes or another program is parsed, and RULES names the test that runs it."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading

import click
import pytest
from docs_blocks import PAGES, ROOT, blocks

CONF = """
[cluster]
name = "{name}"
[engine]
kind = "emulated"
block_tokens = 16
cost = "{cost}"
[gateway]
port = 0
models = "smollm2-135m"
"""
COST = "prefill = [[1, 0.001]]\ndecode = [[1, 0.003]]\n"
WORKER = '[[worker]]\niid = "{}"\nrole = "{}"\n'
TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,5\n0.5,200,9\n"
FILES = {"my_trace.csv": TRACE, "AzureLLMInferenceTrace_conv.csv": TRACE, "azure_2023_conv.csv": TRACE}
FILES |= dict.fromkeys(("prompts.jsonl", "lengths.jsonl", "predictions.jsonl", "drawn.jsonl"), "")
RUN, STARTED, PARSED, ELSEWHERE, LINTED, BY_HAND = "run", "started", "parsed", "elsewhere", "linted", "by hand"

#: What a command looks like -> what becomes of it here, and the test that runs it otherwise. The first one counts.
RULES = [
    (r"(sudo|systemctl|journalctl|docker) ", LINTED, "tests/test_deploy_files.py"),
    (r"curl localhost:8000/v1/models$", RUN, ""),
    (r"bin/setup|bin/test", ELSEWHERE, "tests/test_setup.py"),
    (r"bin/demo", ELSEWHERE, "tests/bench/test_demo.py"),
    (r"unshare .* up --foreground", ELSEWHERE, "tests/proc/test_foreground.py"),
    (r"(guidellm|aiperf) |export HF_HUB_OFFLINE", BY_HAND, "docs/clients.md"),
    (r"tools/vllm ", ELSEWHERE, "tests/bench/test_vllm_command.py"),
    (r"bin/tetri-cli up .*predictor.folder=", PARSED, "tests/proc/test_predictor.py"),
    (r"bin/tetri-cli (up|down)\b", STARTED, ""),
    (r"(XDG_RUNTIME_DIR=\S+ )?bin/tetri-cli down", STARTED, ""),
    (r"(bin/)?tetri-cli sim run ", RUN, ""),
    (r"(bin/)?tetri-cli sim paper", PARSED, "tests/cli/test_sim_paper.py"),
    (r"(bin/)?tetri-cli profile ", PARSED, "tests/cli/test_profile.py"),
    (r"bin/tetri-cli predictor collect ", PARSED, "tests/cli/test_predictor_collect.py"),
    (r"bin/tetri-cli predictor (train|eval) ", PARSED, "tests/cli/test_predictor_eval.py"),
    (r"tools/bench_transfer", PARSED, "tests/bench/test_transfer.py"),
    (r"tools/bench_handover", PARSED, "tests/bench/test_handover.py"),
    (r"tools/bench_admission", PARSED, "tests/bench/test_admission.py"),
    (r"tools/bench_prediction", PARSED, "tests/bench/test_prediction.py"),
    (r"tools/predictor_chain", PARSED, "tests/bench/test_predictor_chain.py"),
    (r"tools/chaos", PARSED, "tests/bench/test_chaos.py"),
    (r"tools/gpu_check", PARSED, "tests/bench/test_gpu_check.py"),
    (r"tools/compare_api", PARSED, "tests/bench/test_compare_api.py"),
    (r"promtool ", RUN if shutil.which("promtool") else ELSEWHERE, "tests/test_alerts.py"),
    (r"(\w+=\S+ )?(bin/tetri-cli|bin/tetri-gateway|curl|eval|\.venv/bin/python|export|key=|printf|cp) ?", RUN, ""),
]


def commands(text):
    """The commands of a block, each with all its lines and without its comment."""
    command = ""
    for line in text.splitlines():
        command += line + "\n"
        heredoc = re.search(r"<<(\w+)\n", command)
        if command.endswith("\\\n") or (heredoc and not command.endswith(f"\n{heredoc[1]}\n")):
            continue
        try:
            if shlex.split(command, comments=True):
                yield re.sub(r" +# .*\n?$", "", command).strip()
        except ValueError:  # an open quote
            continue
        command = ""
    assert not command.strip(), f"a command that does not end: {command}"


def found():
    """(page, command) of all pages, each command once; those of extending.md are test_docs_examples.py's."""
    seen = {}
    for page in PAGES:
        for block in blocks(page):
            if not block.language and page.name != "extending.md":
                for command in commands(block.text):
                    seen.setdefault(command, page.name)
    return [(page, command) for command, page in seen.items()]


def rule(command):
    return next(((how, test) for pattern, how, test in RULES if re.match(pattern, command)), (None, ""))


ALL = found()


def those(*hows):
    chosen = [(page, command) for page, command in ALL if rule(command)[0] in hows]
    return [pytest.param(command, id=f"{page}: {command[:50]}") for page, command in chosen]


# ---------------------------------------------------------------- what is run


class Place:
    """A folder that looks like a clone, in which a shell runs commands, and a run directory."""

    def __init__(self, folder, name, workers):
        self.folder, self.url, self.ended, self.open = folder, "", "", ""
        for each in ("bin", "tools", "conf", "tests", ".venv"):
            (folder / each).symlink_to(ROOT / each)
        for file, text in {**FILES, "cost.toml": COST}.items():
            (folder / file).write_text(text)
        text = CONF.format(name=name, cost=folder / "cost.toml") + "".join(WORKER.format(*each) for each in workers)
        (folder / "mine.toml").write_text(text)
        (folder / "etc").mkdir()
        (folder / "run").mkdir(mode=0o700)
        self.environment = {**os.environ, "TETRI_CONF": str(folder / "mine.toml"), "XDG_RUNTIME_DIR": f"{folder}/run"}

    def sh(self, command, stdin="Hello\n"):
        """Run a command as its page has it, in this place."""
        command = re.sub(r"(localhost|127\.0\.0\.1):80[01]0", self.url.removeprefix("http://"), command)
        command = re.sub(r"\bRID\b", self.open if " end RID" in command else self.ended, command)
        command = re.sub(r"/tmp/tetri-(green|blue)", f"{self.folder}/run", command)
        command = re.sub(r"--requests \d+", "--requests 20", command.replace("/etc/prometheus", f"{self.folder}/etc"))
        command = re.sub(r"^tetri-cli", "bin/tetri-cli", command)
        if command.startswith("bin/tetri-gateway"):
            command = f"timeout --preserve-status -s TERM 1.5 {command}"  # it stays
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A deployment of one prefill and one decode instance that has answered a request and is busy with another."""
    made = Place(folder_of(tmp_path_factory), f"docs-{os.getpid()}", [("p0", "prefill"), ("d0", "decode")])
    made.sh("bin/tetri-cli up")
    try:
        status = json.loads(made.sh("bin/tetri-cli status --json"))
        made.url = status["gateways"]["gateway"]["url"]
        made.ended = json.loads(made.sh("bin/tetri-cli submit Hello --max-tokens 8 --json"))["rid"]
        exports = re.findall(r"export (\w+)=(\S+)", made.sh("bin/tetri-cli openai-env"))
        made.environment |= {name: value.strip("'\"") for name, value in exports}
        yield made
    finally:
        made.sh("bin/tetri-cli down")
        shutil.rmtree(made.folder)


def folder_of(factory):
    """Unix sockets need a short path."""
    import tempfile

    from pathlib import Path

    return Path(tempfile.mkdtemp(prefix="tetri-docs-", dir="/tmp"))


@pytest.mark.parametrize("command", those(RUN))
def test_a_command_runs(place, command):
    place.sh(command)
