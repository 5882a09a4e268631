"""docs/operations.md: every note of a status, and every line that a program logs as a warning or an error, is in the
table of failures, with what to do."""

import ast
import re

import pytest
from docs_blocks import ROOT

PACKAGE = ROOT / "tetri"
LEVELS = {"warning", "error", "critical", "exception"}
#: Files whose functions yield or return whole lines for operators, or name them as constants.
LINES = ("core/broker/notes", "core/broker/membership", "proc/notes", "proc/memory", "proc/open_files", "proc/cpus")
LOGGING = ("core", "net", "kv", "engine", "predict", "proc", "executor.py")
LEAST_WORDS = 3  # a text of fewer is a part of another one


def section(title):
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table():
    """The rows of the table of failures: what one sees, what it means, what to do."""
    rows = [line for line in section("When something is wrong").splitlines() if line.startswith("| `")]
    return [re.split(r"(?<!\\) \| ", row.strip("| ")) for row in rows]


def pattern(node):
    """What a literal text, an f-string or texts put together look like, with anything in the place of values; None for
    what is none of these."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[\w.]*[sdfgr]", ".*", re.escape(text).replace(r"\%", "%").replace(r"%\.", "%."))
        case ast.JoinedStr(values=values):
            return "".join(pattern(value) or ".*" for value in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (pattern(left) or ".*") + (pattern(right) or ".*")
    return None


def is_line(found):
    """Whether a pattern is of a text for people: a few words with spaces between."""
    return r"\ " in found and len(re.findall(r"[a-z]{2,}", re.sub(r"\\.|\.\*", " ", found))) >= LEAST_WORDS


def texts(node, lines):
    """The patterns of what is logged below a node and, with `lines`, of all its other texts but docstrings."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Expr(value=ast.Constant()):
                continue
            case ast.Call(func=ast.Attribute(attr=attr), args=[first, *_]) if attr in LEVELS:
                yield pattern(first)
            case ast.Call(func=ast.Attribute(attr="log"), args=[_, first, *_]):
                yield pattern(first)
        found = pattern(child) if lines else None
        if found is not None and is_line(found):
            yield found
        else:
            yield from texts(child, lines)


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name.startswith(LOGGING) or name in LINES:
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def told():
    """file -> pattern of everything that an operator may read."""
    for name, tree in sources():
        for found in texts(tree, name in LINES):
            if found is not None and is_line(found):
                yield name, found


SEEN = sorted({*told()})
#: Rows about what others say: supervisord, and HTTP's statuses.
OTHERS = re.compile(r"`exited: |never paired with|no descriptors are free|^\d{3}$")


@pytest.mark.parametrize(("name", "found"), SEEN, ids=lambda text: text[:40])
def test_what_an_operator_may_read_is_in_the_table(name, found):
    assert any(re.search(found, row[0]) for row in table())


def test_every_row_says_what_it_means_and_what_to_do_and_is_still_said():
    known = [found for _, found in SEEN] + alerts()
    assert [row for row in table() if len(row) != 3 or not all(row)] == []
    stale = [row[0] for row in table() if not any(re.search(found, row[0]) for found in known)]
    assert [text for text in stale if not OTHERS.search(text)] == []


def alerts():
    return re.findall(r"- alert: (\w+)", (ROOT / "conf" / "alerts.yml").read_text(encoding="utf-8"))


def test_every_alert_has_a_row():
    told_of = {name for row in table() for name in re.findall(r"`(Tetri\w+)`", row[0])}
    assert told_of == {*alerts()}


@pytest.mark.parametrize(
    "metric", ["tetri_requests_ended_total", "tetri_requests_refused_total", "tetri_retries_total"]
)
def test_every_reason_of_a_metric_is_explained(metric):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    reasons = re.search(rf"\| `{metric}` \|.*: ([a-z_, ]+) \|", page)[1].split(", ")
    cells = re.findall(r"^\| (`.*?) \|", section("Reasons"), re.M)
    explained = {word for cell in cells for word in cell.split("`")[1::2]}
    assert len(reasons) > 3 and {*reasons} <= explained


def test_the_test_finds_a_new_line():
    code = ast.parse('log.warning("%s is odd: look at %s", a, b)\nx = [f"{a} has {b} on it"]')
    assert {*texts(code, lines=False)} == {r".*\ is\ odd:\ look\ at\ .*"}
    assert {*texts(code, lines=True)} == {r".*\ is\ odd:\ look\ at\ .*", r".*\ has\ .*\ on\ it"}
