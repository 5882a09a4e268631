"""Every command in README.md and docs/ is run as it stands there: on emulated engines, beside other deployments. What
needs a model, minutes or another program is parsed, and RULES names the test that runs it."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import click
import pytest
from docs_blocks import PAGES, ROOT, blocks
from live import wait_until

from tetri import cli
from tetri.client import Client
from tetri.config import load

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
RUN, STARTED, STAYS, ENDED, PARSED = "run", "started", "stays", "ended", "parsed"
ELSEWHERE, LINTED, BY_HAND = "elsewhere", "linted", "by hand"

#: What a command looks like -> what becomes of it here, and the test that runs it otherwise. The first one counts.
RULES = [
    (r"(sudo|systemctl|journalctl|docker) ", LINTED, "tests/test_deploy_files.py"),
    (r"bin/setup|bin/test", ELSEWHERE, "tests/test_setup.py"),
    (r"bin/demo", ELSEWHERE, "tests/bench/test_demo.py"),
    (r"unshare .* up --foreground", ELSEWHERE, "tests/proc/test_foreground.py"),
    (r"(guidellm|aiperf) |export HF_HUB_OFFLINE", BY_HAND, "docs/clients.md"),
    (r"tools/vllm ", ELSEWHERE, "tests/bench/test_vllm_command.py"),
    (r"bin/tetri-cli up .*predictor.folder=", PARSED, "tests/proc/test_predictor.py"),
    (r"(XDG_RUNTIME_DIR=\S+ )?bin/tetri-cli (up|down)\b", STARTED, ""),
    (r"bin/tetri-cli end RID", ENDED, ""),
    (r"bin/tetri-gateway ", STAYS, ""),
    (r"bin/tetri-cli sim run ", RUN, ""),
    (r"bin/tetri-cli sim paper", PARSED, "tests/cli/test_sim_paper.py"),
    (r"(bin/)?tetri-cli sim sweep", PARSED, "tests/cli/test_sim_sweep.py"),
    (r"(bin/)?tetri-cli bench run ", PARSED, "tests/cli/test_bench_run.py"),
    (r"(bin/)?tetri-cli bench compare", PARSED, "tests/cli/test_bench_compare.py"),
    (r"bin/tetri-cli profile ", PARSED, "tests/cli/test_profile.py"),
    (r"bin/tetri-cli predictor collect ", PARSED, "tests/cli/test_predictor_collect.py"),
    (r"bin/tetri-cli predictor (train|eval) ", PARSED, "tests/cli/test_predictor_eval.py"),
    (r"tools/bench_transfer", PARSED, "tests/bench/test_transfer.py"),
    (r"tools/bench_handover", PARSED, "tests/bench/test_handover.py"),
    (r"tools/bench_migrate", PARSED, "tests/bench/test_migrate.py"),
    (r"tools/parity", PARSED, "tests/bench/test_parity.py"),
    (r"tools/bench_admission", PARSED, "tests/bench/test_admission.py"),
    (r"tools/bench_prediction", PARSED, "tests/bench/test_prediction.py"),
    (r"tools/predictor_chain", PARSED, "tests/bench/test_predictor_chain.py"),
    (r"tools/chaos", PARSED, "tests/bench/test_chaos.py"),
    (r"tools/gpu_check", PARSED, "tests/bench/test_gpu_check.py"),
    (r"tools/compare_api", PARSED, "tests/bench/test_compare_api.py"),
    (r"(\w+=\S+ )?(bin/tetri-cli|curl|eval|\.venv/bin/python|export|key=|cp) ?", RUN, ""),
]


def commands(text):
    """The commands of a block, each with all its lines and without its comment."""
    command = ""
    for line in text.splitlines():
        command += line + "\n"
        heredoc = re.search(r"<<(\w+)\n", command)
        if command.endswith(("\\\n", "&&\n")) or (heredoc and not command.endswith(f"\n{heredoc[1]}\n")):
            continue
        try:
            if shlex.split(command, comments=True):
                yield re.sub(r"\\\n *", "", re.sub(r" +# .*\n?$", "", command)).strip()
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
                    seen.setdefault(re.sub("^tetri-cli", "bin/tetri-cli", command), page.name)
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

    def __init__(self, workers):
        # pytest's own folders have paths too long for a Unix socket
        self.folder = folder = Path(tempfile.mkdtemp(prefix="tetri-docs-", dir="/tmp"))
        self.name = f"docs{os.getpid()}-{os.urandom(2).hex()}"
        self.own = f"--set cluster.name={self.name} --set gateway.port=0"  # beside other deployments
        self.clients = f"ipc://{folder}/run/tetri/clients"
        self.url, self.ended = "", ""
        for each in ("bin", "tools", "conf", "tests", ".venv"):
            (folder / each).symlink_to(ROOT / each)
        for file, text in {**FILES, "cost.toml": COST}.items():
            (folder / file).write_text(text)
        text = [CONF.format(name=self.name, cost=folder / "cost.toml"), *(WORKER.format(*each) for each in workers)]
        (folder / "mine.toml").write_text("".join(text))
        (folder / "etc").mkdir()
        (folder / "run").mkdir(mode=0o700)
        self.environment = {**os.environ, "TETRI_CONF": f"{folder}/mine.toml", "XDG_RUNTIME_DIR": f"{folder}/run"}
        self.environment.pop("TETRI_API_KEY", None)

    def sh(self, command):
        """Run a command as its page has it, in this place."""
        command = re.sub(r"(localhost|127\.0\.0\.1):80[01]0", self.url.removeprefix("http://"), command)
        command = re.sub(r"\bRID\b", self.ended, command)
        command = re.sub(r"/tmp/tetri-(green|blue)", f"{self.folder}/run", command)
        command = re.sub(r"--requests \d+", "--requests 20", command.replace("/etc/prometheus", f"{self.folder}/etc"))
        for program in re.findall(r"\b(curl|openssl|promtool)\b", command):
            if shutil.which(program) is None:
                pytest.skip(f"there is no {program}")
        if command.endswith("ready"):  # asking has a pair tried that has carried no KV lately
            wait_until(lambda: self.shell(command).returncode == 0, command)
        done = self.shell(command)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout

    def gateways(self):
        """Their URLs by name."""
        known = json.loads(self.sh("bin/tetri-cli status --json"))["gateways"]
        return {name: each["url"] for name, each in known.items()}

    def shell(self, command):
        given = {"cwd": self.folder, "env": self.environment, "input": "Hello\n", "text": True}
        return subprocess.run(["bash", "-c", command], capture_output=True, timeout=100, **given)

    def remove(self):
        """Stop the deployment, which must leave nothing, and remove the folder."""
        self.sh("bin/tetri-cli down")
        assert [*Path("/dev/shm").glob(f"tetri-{self.name}-*")] == []
        shutil.rmtree(self.folder)


def settings(command):
    """The values of --set in a command."""
    words = shlex.split(command)
    return [after for word, after in zip(words, words[1:], strict=False) if word == "--set"]


UPS = [command for _, command in ALL if re.match(r"bin/tetri-cli up\b", command) and rule(command)[0] == STARTED]
#: Settings that no deployment can have with those of the other commands: they get one of their own.
ALONE = ("gateway.count=0", "gateway.key_file=$PWD/keys")
TOGETHER = [each for command in UPS if " --conf " not in command for each in settings(command) if each not in ALONE]


@pytest.fixture(scope="module")
def place():
    """A deployment of two instances as in conf/default.toml, with all settings of the pages that go together. It has
    answered a request."""
    made = Place([("w0", "auto"), ("w1", "auto")])
    made.sh(f"bin/tetri-cli up {' '.join(f'--set {each}' for each in TOGETHER)} {made.own}")
    try:
        made.url = made.gateways()["gateway"]
        made.ended = json.loads(made.sh("bin/tetri-cli submit Hello --max-tokens 8 --json"))["rid"]
        exports = re.findall(r"export (\w+)=(\S+)", made.sh("bin/tetri-cli openai-env"))
        made.environment |= {name: value.strip("'\"") for name, value in exports}
        yield made
    finally:
        made.remove()


@pytest.mark.parametrize("command", those(RUN))
def test_a_command_runs(place, command):
    place.sh(command)


@pytest.mark.parametrize("command", those(ENDED))
def test_a_request_is_ended(place, command):
    with Client(place.clients) as client, client.stream("A long story", max_tokens=4000, ignore_eos=True) as answer:
        next(iter(answer))
        place.ended = answer.rid
        place.sh(command)
        assert answer.result is None


@pytest.mark.parametrize("command", those(STAYS))
def test_a_further_gateway_joins_by_hand_and_leaves(place, command):
    with subprocess.Popen(
        command.split(), cwd=place.folder, env=place.environment, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: "gateway2" in place.gateways(), command)
        process.terminate()
    assert process.returncode == 0 and "gateway2" not in place.gateways()


def test_the_python_of_the_pages_runs(place):
    """What imports nothing but tetri and OpenAI's client."""
    elsewhere = ("extending.md", "adaptive.md")  # test_docs_examples.py runs theirs
    pages = [page for page in PAGES if page.name not in elsewhere]
    of = [block for page in pages for block in blocks(page) if block.language == "python"]
    ours = [block for block in of if imported(block.text) <= {"tetri", "openai"}]
    assert len(ours) >= 4 and {*of} - {*ours} == {block for block in of if block.page == "clients.md"} - {*ours}
    for block in ours:
        assert place.sh(f".venv/bin/python -c {shlex.quote(block.text)}")


def imported(text):
    return {*re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)}


@pytest.mark.parametrize("command", UPS)
def test_a_deployment_may_have_these_settings(command, monkeypatch):
    """The deployments of this file have them, or those of a file that the command names."""
    monkeypatch.setenv("PWD", "/tmp")
    words = shlex.split(command)
    named = words[words.index("--conf") + 1] if "--conf" in words else "conf/emulated.toml"
    assert load(ROOT / named, settings(command)).workers
    assert " --conf " in command or {*settings(command)} <= {*TOGETHER, *ALONE}


def test_a_deployment_with_keys_answers_those_who_have_one():
    made = Place([("m0", "mixed")])
    try:
        key = made.sh(f"{one('key=')} && echo $key").strip()
        made.sh(f"{one('bin/tetri-cli up --set gateway.key_file')} {made.own}")
        made.url = made.gateways()["gateway"]
        ask = f"{one('curl localhost:8000/metrics')} -s -o /dev/null -w '%{{http_code}}'"
        assert (made.sh(ask), made.sh(f"{ask} -H 'Authorization: Bearer {key}'")) == ("401", "200")
    finally:
        made.remove()


def test_a_deployment_without_http_has_no_gateway():
    made = Place([("m0", "mixed")])
    try:
        made.sh(f"{one('bin/tetri-cli up --set gateway.count=0')} {made.own}")
        assert made.gateways() == {}
    finally:
        made.remove()


def one(beginning):
    """The one command of the pages that begins so."""
    [command] = [command for _, command in ALL if command.startswith(beginning)]
    return command


# ---------------------------------------------------------------- what is parsed, and what is run elsewhere


def parse(command):
    """Raises a click error if the program does not take these arguments."""
    program, *arguments = shlex.split(command, comments=True)
    if program.startswith("tools/"):
        module = (ROOT / program).read_text().splitlines()[-1].split()[4]
        package = importlib.util.find_spec(module).submodule_search_locations is not None
        made = importlib.import_module(f"{module}.__main__" if package else module).main
        made.make_context(program, arguments)
        return
    context, made = None, cli.group
    while True:
        context = made.make_context(made.name or program, arguments, parent=context)
        if not hasattr(made, "resolve_command"):
            return
        _, made, arguments = made.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("command", those(PARSED))
def test_a_long_command_has_arguments_that_its_program_takes(command, tmp_path, monkeypatch):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    for each in ("conf", "tests"):
        (tmp_path / each).symlink_to(ROOT / each)
    (tmp_path / "my-predictor").mkdir()
    monkeypatch.chdir(tmp_path)
    parse(command)


def test_every_command_has_a_rule_and_every_rule_a_test_and_a_command():
    assert [command for _, command in ALL if rule(command)[0] is None] == []
    assert [
        test for _, how, test in RULES if how not in (RUN, STARTED, STAYS, ENDED) and not (ROOT / test).is_file()
    ] == []
    used = {rule(command) for _, command in ALL}
    assert [each for _, *each in RULES if tuple(each) not in used] == []


@pytest.mark.parametrize("text", ["a 'b\nc'", "a \\\n  b", "a <<END\nx\nEND"])
def test_a_command_of_several_lines_is_one(text):
    assert [*commands(text + "\nd  # why\n")] == [text.replace("\\\n  ", ""), "d"]


def test_commands_in_sentences_are_there_with_their_options():
    spans = {span for page in PAGES for span in re.findall(r"`(?:bin/)?(tetri-cli [^`\n]+)`", page.read_text("utf-8"))}
    wrong = []
    for span in spans:
        made, words = cli.group, span.split()[1:]
        while words and isinstance(made, click.Group) and made.get_command(None, words[0]):
            made = made.get_command(None, words.pop(0))
        known = {"--help", *(name for each in made.params for name in each.opts)}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if made is cli.group and not options <= {"--version", "--help"} or not options <= known:
            wrong.append(span)
    assert len(spans) > 12 and wrong == []
