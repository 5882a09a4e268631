"""A length predictor for live tests: a program of the cluster that runs `install` first has a classifier that reads the
number in a prompt's text, in one of several tempers. Its folder is made by `folder`; card and head are real files."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.predict import made
from tetri.predict.card import HEAD, Card, write_card
from tetri.predict.heads import save_head
from tetri.predict.model import examine
from tetri.proc import predictor
from tetri.request import Expected, LengthDistribution

SLOW_S = 0.3  # more than a prompt waits
BUCKETS = 10
SURE = 0.91  # of the bucket that the text names


def folder(place: Path) -> Path:
    """Beside the card a head that nobody uses."""
    inside = place / "classifier"
    inside.mkdir()
    digest = save_head(made.head(6), inside / HEAD)
    write_card(made.card("classifier", digest, encoder="none", cut=64), inside)
    return place


def prologue(temper: str) -> str:
    """Statements for `LiveCluster`."""
    root = Path(__file__).parents[2]
    ready = f"import sys; sys.path.insert(0, {str(root)!r})"
    return f"{ready}; from tests.proc.faked_predictor import install; install({temper!r}); "


def install(temper: str) -> None:
    def load(folder: Path, kind: str, weights: str) -> Faked:
        card, _ = examine(folder, kind, weights)
        return Faked(card, temper)

    predictor.load = load
    predictor.one_core = lambda: None  # there is no torch


def odds_of(text: str) -> LengthDistribution:
    """Nine tenths for the bucket of the first number in it."""
    found = re.search(r"\d+", text)
    bucket = min(int(found[0]) // made.WIDTH, BUCKETS - 1) if found else 0
    rest = (1 - SURE) / (BUCKETS - 1)
    return LengthDistribution(made.WIDTH, tuple(SURE if each == bucket else rest for each in range(BUCKETS)))


@dataclass(frozen=True)
class Faked:
    card: Card
    temper: str

    def expected(self, note: str) -> Expected:
        return Expected(self.card.kind, LengthDistribution(self.card.width, self.card.prior), self.card.levels, note)

    def read(self, texts: Sequence[str]) -> tuple[list[LengthDistribution], list[int]]:
        if self.temper == "slow":
            time.sleep(SLOW_S)
        if self.temper == "never":
            threading.Event().wait()
        if self.temper == "moody" and "moody" in " ".join(texts):
            raise RuntimeError("out of ideas")
        return list(map(odds_of, texts)), list(map(len, texts))
