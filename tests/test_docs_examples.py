"""docs/extending.md, and the rule of docs/adaptive.md: their examples, carried out as they stand there on a copy of the
code."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from docs_blocks import ROOT, blocks

PAGE = ROOT / "docs" / "extending.md"
COPIED = ("bin", "conf", "docs", "tests", "tetri")
PAGES = (PAGE, ROOT / "docs" / "adaptive.md")
EXAMPLES = [block for page in PAGES for block in blocks(page) if block.language in ("python", "diff", "toml")]
TESTS = {
    "tests/policy/test_dispatch.py": "tests/policy/test_rules.py",
    "tests/policy/test_route.py": "",
    "tests/engine/test_jittery.py": "",
    "tests/kv/test_brief.py": "",
    "tests/proc/test_metrics.py": "",
}


def apply(block, root):
    """Write a file, add to its end, or change it as the difference says; each context must be there once."""
    first, _, rest = block.text.partition("\n")
    path = root / first.split()[-1]
    if block.language != "diff":
        before = f"{path.read_text(encoding='utf-8')}\n\n" if path.exists() else ""
        path.write_text(before + rest, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    for hunk in rest.split("@@\n"):
        lines = [(line[:1], line[1:] + "\n") for line in hunk.splitlines()]
        old, new = ("".join(line for sign, line in lines if sign != not_of) for not_of in "+-")
        assert text.count(old) == 1, f"{path.relative_to(root)} has this {text.count(old)} times, not once:\n{old}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with all examples in it."""
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", root)
    for block in EXAMPLES:
        apply(block, root)
    return root


def run(root, *arguments):
    """A Python program on the copy."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_of_the_examples_pass_on_the_copy(copy):
    named = {first for block in EXAMPLES if (first := block.text.split("\n")[0].split()[-1]).startswith("tests/")}
    assert named == {*TESTS}
    passed = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *filter(None, TESTS.values()))
    assert int(re.search(r"(\d+) passed", passed)[1]) > 100


COMMANDS = [line for block in blocks(PAGE) if not block.language for line in block.text.splitlines()]


def test_its_simulations_run_on_the_copy(copy):
    simulations = [line for line in COMMANDS if line.startswith("bin/tetri-cli sim ")]
    for line in simulations:
        words = [*shlex.split(line)[1:], "--requests", "20", "--json"]
        told = json.loads(run(copy, "-c", "from tetri.cli import main; main()", *words))
        assert told["done"] == 20
    assert len(simulations) == 2


LIVE = """
from live import LiveCluster
with LiveCluster(overrides={}) as cluster:
    print(cluster.client().generate("Which way did my KV come?", max_tokens=8).receipt.transport)
"""


def test_what_its_deployments_add_serves_on_the_copy(copy):
    """All of them in one deployment, which says in a receipt by which path the KV came."""
    ups = [
        shlex.split(line) for line in COMMANDS if line.startswith("bin/tetri-cli up --conf conf/emulated.toml --set ")
    ]
    settings = [words[-1] for words in ups]
    assert [each.partition("=")[0] for each in settings] == [
        *("policy.decode_route", "emulated.jitter_s", "transfer.transport", "engine.cost"),
    ]
    start = f"import sys; sys.path.insert(0, {str(copy / 'tests')!r})"
    assert run(copy, "-c", start + LIVE.format(settings)) == "brief\n"
