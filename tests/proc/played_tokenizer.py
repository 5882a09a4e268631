"""A tokenising process for tests, with texts that kill it or keep it busy. As a program it gets the descriptor of its
connection, and a folder in which it lists the texts."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from tetri.proc.tokenizer import serve
from tetri.text import ByteTokenizer, TextError


def command(folder: Path) -> list[str]:
    return [sys.executable, __file__, "{}", str(folder)]


def tokenised(folder: Path) -> list[str]:
    """The texts that the process has begun with, in order."""
    path = folder / "texts"
    return path.read_text().splitlines() if path.exists() else []


def pid(folder: Path) -> int:
    """Of the newest process."""
    return int((folder / "pid").read_text())


class Played(ByteTokenizer):
    """`die`: at every try. `die once`: at the first. `wait`: until somebody writes to the pipe `go` in the folder.
    `wrong`: cannot be tokenised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, text: str) -> list[int]:
        with (self.folder / "texts").open("a") as file:
            file.write(f"{text[:20]}\n")
        if text == "die" or (text == "die once" and tokenised(self.folder).count(text) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "wait":
            (self.folder / "go").read_bytes()
        if text == "wrong":
            raise TextError("this text is wrong")
        return super().encode(text)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if (folder / "broken").exists():
        sys.exit(1)
    (folder / "pid").write_text(str(os.getpid()))
    serve(Played(folder), Connection(int(sys.argv[1])))
