"""The metrics of docs/metrics.md, and which of them an expression of PromQL uses."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"
ROW = re.compile(r"^\| `([\w:]+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
SERIES = {"histogram": ("_bucket", "_sum", "_count")}
SELECTED = re.compile(r"(?<![\w:])((?:tetri_|vllm:)\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\b(?:by|without) \(([^)]*)\)")
LABEL = re.compile(r"(\w+) *(?:=~|!~|!=|=)")
#: Prometheus itself adds these to every series.
ADDED = {"job", "instance"}


class Metric(NamedTuple):
    kind: str
    labels: frozenset[str]


def metrics():
    """Each documented metric by its name."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    return {name: Metric(kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def series():
    """Each time series that Prometheus then has, with the labels that it may have."""
    found = {}
    for name, metric in metrics().items():
        for suffix in SERIES.get(metric.kind, ("",)):
            found[name + suffix] = metric.labels | ADDED | ({"le"} if suffix == "_bucket" else set())
    return found


def used(expression):
    """The names of series in an expression."""
    return {name for name, _ in SELECTED.findall(expression)}


def problems(expression, known):
    """What an expression asks for that no page documents."""
    labels = set[str]()
    for name, selector in SELECTED.findall(expression):
        if name not in known:
            yield f"no metric {name}"
            continue
        labels |= known[name]
        yield from (f"{name} has no label {label}" for label in LABEL.findall(selector) if label not in known[name])
    for group in GROUPED.findall(expression):
        yield from (f"no metric has the label {label}" for label in re.findall(r"\w+", group) if label not in labels)
