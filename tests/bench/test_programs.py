"""The programs of tools/: only calls of what is in tetri/bench, and what they cannot do is one line."""

import os
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
EMULATED = str(REPOSITORY / "conf" / "emulated.toml")
SETUP = {"setup_browser"}  # it makes what the others need: tests/test_setup.py
TOOLS = sorted(path for path in (REPOSITORY / "tools").iterdir() if path.is_file() and path.name not in SETUP)
MODEL = pytest.mark.model
CALL = 'run python -P -m '
INCLUDE = '. "$(dirname "$(readlink -f "$0")")/../bin/launcher.sh"'


def spec(program):
    module = program.read_text().splitlines()[-1].removeprefix(CALL).removesuffix(' "$@"')
    assert module.startswith("tetri.bench.")
    found = find_spec(module)
    return find_spec(f"{module}.__main__") if found.submodule_search_locations else found


@pytest.mark.parametrize("program", TOOLS, ids=lambda path: path.name)
def test_a_program_is_nothing_but_a_call(program):
    lines = program.read_text().splitlines()
    assert os.access(program, os.X_OK) and lines[0] == "#!/bin/sh" and len(lines) == 4
    assert lines[1].startswith("# ") and lines[2] == INCLUDE
    assert f'main(prog_name="{program.name}")' in Path(spec(program).origin).read_text()


@pytest.mark.parametrize(
    ("program", "arguments", "status", "says"),
    [
        ("chaos", ["--faults", "dorp=1"], 2, "'dorp=1' is no fault: use drop"),
        ("bench_handover", ["--conf", EMULATED], 1, "must have one prefill and one decode worker"),
        ("bench_handover", ["--short", "900", "--long", "800"], 1, "--short (900) must be less than --long (800)"),
        ("bench_handover", ["--set", "engine.kinds=1"], 1, "engine.kinds"),
        ("bench_overhead", ["--conf", EMULATED], 1, "bench_overhead: only the real engine"),
    ],
)
def test_what_cannot_be_measured_is_one_line(program, arguments, status, says, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(spec(REPOSITORY / "tools" / program).name).main(arguments, prog_name=program)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (status, "", 1)
    assert err.startswith(f"{program}: ") and says in err


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        ("bench_route", ["--policy", "best"], "power_of_two"),
        ("bench_admission", ["--workload", "trace"], "--workload trace needs --trace FILE"),
        ("fit_workloads", ["/nowhere"], "'/nowhere': No such file"),
        ("fit_workloads", [__file__], "not the digitised curves: JSONDecodeError"),
        ("fit_workloads", [__file__, "--only", "X"], "--only: unknown workload 'X': LPLD, "),
        ("bench_transfer", ["--transport", "carrier pigeon"], "unknown transport 'carrier pigeon'"),
        ("bench_transfer", ["--sizes", "four"], "not a list of numbers"),
        ("bench_transfer", ["--sizes", "0"], "above 0"),
        ("bench_transfer", ["--sizes", ","], "empty"),
        ("bench_handover", ["--conf", EMULATED, "--plot", "/proc/x.png"], "--plot: /proc/x.png cannot be written"),
        ("bench_prediction", ["--predictions", "x", "--plot", "x.pdf"], "--plot draws a PNG"),
        ("predictor_chain", ["--prompts", "x", "--keep", "/proc"], "--keep: /proc exists already"),
    ],
)
def test_wrong_arguments_are_told(program, arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(spec(REPOSITORY / "tools" / program).name).main(arguments, prog_name=program)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and says in err


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        ("bench_predictor", ["--model", "nowhere"], "unknown model"),
        pytest.param("bench_hidden_hook", ["--model", "nowhere"], "unknown model", marks=MODEL),
        pytest.param("bench_predictor", ["--predictor", "/nowhere"], "no predictor in", marks=MODEL),
        pytest.param("bench_hidden_hook", ["--predictor", "/nowhere"], "no hidden predictor in", marks=MODEL),
    ],
)
def test_with_an_engine_beside_it_too(program, arguments, says):
    """In a process of its own, for it takes away the output of all that is not the result."""
    done = subprocess.run([REPOSITORY / "tools" / program, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"{program}: ") and says in done.stderr
