"""make_configuration_page: write the tables of docs/configuration.md from tetri/config/tables.py.

    tools/make_configuration_page [--check]

A setting is described by the comment above it and the one behind it, its section by the docstring of its class. What
stands before the marker in the page is written by hand and stays.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import sys
import tokenize
from collections.abc import Mapping
from typing import Any

import click

from tetri import atomic, terminal
from tetri.bench.deployment import REPOSITORY
from tetri.bench.report import Program
from tetri.config import Config, WorkerConfig, tables
from tetri.strict import types

PAGE = REPOSITORY / "docs" / "configuration.md"
MARKER = "<!-- From here on written by tools/make_configuration_page: edit tetri/config/tables.py instead. -->\n"
HEAD = "| setting | default | allowed | what |\n|---|---|---|---|\n"
SECTIONS: dict[str, type] = {
    **{f"[{f.name}]": type(f.default) for f in dataclasses.fields(Config) if f.name != "workers"},
    "[[worker]]": WorkerConfig,
}


@click.command(cls=Program)
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 if the page is not up to date.")
def main(check: bool) -> None:
    """Write the tables of docs/configuration.md from tetri/config/tables.py."""
    before = PAGE.read_text(encoding="utf-8")
    after = before.partition(MARKER)[0] + MARKER + reference(inspect.getsource(tables))
    if check:
        if after != before:
            terminal.tell("make_configuration_page: docs/configuration.md differs: run tools/make_configuration_page")
        sys.exit(after != before)
    with atomic.file(PAGE) as part:
        part.write_text(after, encoding="utf-8")


def reference(source: str) -> str:
    """Return the part of the page below the marker. `source`: the text of tetri/config/tables.py."""
    found = described(source)
    return "".join(f"\n## `{name}`\n\n{_section(kind, found[kind.__name__])}" for name, kind in SECTIONS.items())


def described(source: str) -> dict[str, dict[str, str]]:
    """Return what the comments say of each field: class -> field -> text, in the order of the file."""
    lines = source.splitlines()
    read = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in read if token.type == tokenize.COMMENT}
    alone = {line for line in comments if lines[line - 1].lstrip().startswith("#")}
    return {
        node.name: {
            ast.unparse(field.target): _joined(field, comments, alone)
            for field in node.body
            if isinstance(field, ast.AnnAssign)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _joined(field: ast.AnnAssign, comments: Mapping[int, str], alone: set[int]) -> str:
    first = field.lineno
    while first - 1 in alone:
        first -= 1
    above = " ".join(comments[line] for line in range(first, field.lineno) if line in comments)
    behind = comments.get(field.end_lineno or field.lineno, "")
    text = ". ".join(part for part in (above.rstrip("."), behind.rstrip(".")) if part)
    return text[:1].upper() + text[1:]


def _section(kind: type, texts: Mapping[str, str]) -> str:
    rows = "".join(
        f"| `{f.name}` | {_default(f)} | {_cell(_allowed(f, types(kind)[f.name]))} | {_cell(texts[f.name])} |\n"
        for f in dataclasses.fields(kind)
    )
    return f"{' '.join((kind.__doc__ or '').split())}\n\n{HEAD}{rows}"


def _default(f: dataclasses.Field[Any]) -> str:
    return "required" if f.default is dataclasses.MISSING else f"`{json.dumps(f.default)}`"


def _allowed(f: dataclasses.Field[Any], kind: type) -> str:
    if kind is bool:
        return "`true`, `false`"
    if "names" in f.metadata:
        return ", ".join(f"`{name or json.dumps(name)}`" for name in f.metadata["names"])
    if kind is str:
        return f.metadata.get("allowed") or "a text"
    low, high = f.metadata["range"]
    return f"a whole number, {low:,} to {high:,}" if kind is int else f"a number, {low:,.10g} to {high:,.10g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main(prog_name="make_configuration_page")
