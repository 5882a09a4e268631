"""docs/operations.md: every note of a status, and every line that a program logs as a warning or an error, is in the table of
failures, with what to do."""

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


def words(found):
    return re.findall(r"[a-z]{2,}", re.sub(r"\\.|\.\*", " ", found))


def texts(node, lines):
    """The patterns of what is logged below a node and, with `lines`, of all its other texts but docstrings."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Expr(value=ast.Constant()):
                continue
            case ast.Call(func=ast.Attribute(attr=attr), args=[first, *others]) if attr in LEVELS:
                yield pattern(first)
            case ast.Call(func=ast.Attribute(attr="log"), args=[_, first, *others]):
                yield pattern(first)
        found = pattern(child) if lines else None
        if found is not None and len(words(found)) >= LEAST_WORDS:
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
            if found is not None and len(words(found)) >= LEAST_WORDS:
                yield name, found


SEEN = sorted({*told()})


@pytest.mark.parametrize(("name", "found"), SEEN, ids=lambda text: text[:40])
def test_what_an_operator_may_read_is_in_the_table(name, found):
    assert any(re.search(found, row[0]) for row in table())
