"""The code blocks of the pages, for tests that carry them out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "protocol.md")]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A code block: its page, its language ("" for commands) and its lines, without the page's indentation."""

    page: str
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """All code blocks of a page, in order."""
    for indent, language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        yield Block(page.name, language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
