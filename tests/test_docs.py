"""README.md and docs/: every file and folder that they name exists."""

import re
from pathlib import Path

import pytest
from docs_blocks import blocks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASES = (ROOT, ROOT / "tetri", ROOT / "docs", ROOT / "tests")
FOLDERS = {path.name for base in BASES for path in base.iterdir() if path.is_dir()}
FILES = {path.name for base in ("tetri", "tests", "docs", "conf") for path in (ROOT / base).rglob("*.*")}
FILES.add("README.md")
#: Files that a reader makes, or `up`.
EXAMPLES = {"cluster.toml", "conf/cost/my-machine.toml", "conf/cost/NAME.toml", "openai/smollm2-135m"}
EXAMPLES |= {block.text.split("\n")[0].split()[-1] for block in blocks(ROOT / "docs" / "extending.md")}
PATH = re.compile(r"(?<![\w/.~<-])[\w-]+(?:/[\w.*-]+)+/?|(?<![\w/.~<-])\w+\.(?:py|md|toml)\b")


def named(text):
    """What looks like the path of a file or folder of the repository, in order of appearance."""
    for found in PATH.findall(text):
        path = found.rstrip("/.")
        if re.search(r"\.(py|md|toml)$", path) or path.split("/")[0] in FOLDERS:
            yield path


def exists(path):
    """A path counts from the repository, tetri/, docs/ or tests/; a bare file name may be of any folder there."""
    if "/" not in path:
        return path in FILES
    return any(any(base.glob(path)) for base in BASES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
    missing = {path for path in named(page.read_text(encoding="utf-8")) if not exists(path)}
    assert missing - EXAMPLES == set()


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)|runbook: (\S+?)#([\w-]+)")


def anchors(page):
    """The names of the headings of a page, as they stand in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "conf" / "alerts.yml"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    dead = []
    for path, anchor, runbook, there in LINK.findall(page.read_text(encoding="utf-8")):
        if path.startswith(("http:", "https:")):
            continue
        target = ROOT / runbook if runbook else page.parent / path if path else page
        anchor = anchor or there
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{path or runbook}#{anchor}")
    assert dead == []


def test_paths_are_found_and_a_missing_one_is_noticed():
    text = "See `core/broker/lost.py`, tools/parity, chunk.py, `gone.py` and tests/sim; TTFT/JCT is a ratio."
    assert list(named(text)) == ["core/broker/lost.py", "tools/parity", "chunk.py", "gone.py", "tests/sim"]
    assert [path for path in named(text) if not exists(path)] == ["core/broker/lost.py", "gone.py"]
