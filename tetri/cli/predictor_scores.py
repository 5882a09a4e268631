"""Output that the `predictor` commands share: skipped lines, and scores as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tetri import terminal

BAD_LINES = 20
GRANULARITIES = ("100", "200", "400")


def report_bad(lines: Sequence[str]) -> None:
    """Print the lines that cannot be used on stderr, BAD_LINES at most."""
    for line in lines[:BAD_LINES]:
        terminal.tell(f"skipped: {line}")
    if len(lines) > BAD_LINES:
        terminal.tell(f"skipped: {len(lines) - BAD_LINES} more lines")


def shown(found: Mapping[str, Any]) -> str:
    """The scores as a table, beside the baselines."""
    lines = [f"{found['n']} prompts that were not learnt from", ""]
    lines.append(f"{'':24} {'acc 100':>8} {'200':>6} {'400':>6} {'MAE':>6} {'tau':>6} {'ECE':>6} {'RPS':>6}")
    lines += [_row(_LABELS[name], found[name]) for name in ("majority", "by_source", "by_length")]
    for kind, of in found["kinds"].items():
        lines.append(_row(kind, of["acc"] | of))
    if at_best := found.get("ceiling"):
        lines += [_row(_LABELS[name], at_best[name]) for name in ("another", "others", "at_most")]
    if left_out := found.get("left_out"):
        lines += ["", _row(_LABELS["by_source"], left_out["by_source"])]
        lines.append(_row(left_out["kind"], left_out["acc"] | left_out))
        lines.append(f"  ({left_out['n']} prompts, each by the network that has not seen it)")
    for kind, of in found["kinds"].items():
        if bound := of.get("bound"):
            bound_note = f"{bound['inside']:.1%} of the texts end below it, it is {bound['tokens']} tokens on average"
            lines += ["", f"upper bound for {bound['share']:.0%} by {kind}: {bound_note}"]
    if later := found.get("later"):
        lines += ["", "what remains after so many output tokens, by the hidden state there:"]
        lines.append(f"{'tokens':>8} {'texts':>6} {'acc 200':>8} {'MAE':>6} {'of the median':>14} {'tau':>6}")
        for known, of in later.items():
            error = f"{of['mae']:6.0f} {of['mae_of_the_median']:14.0f}"
            lines.append(f"{known:>8} {of['n']:6} {of['acc']['200']:8.3f} {error} {of['tau']:6.2f}")
    return "\n".join(lines + ([f"\nwritten to {found['out']}"] if "out" in found else []))


_LABELS = {
    "majority": "likeliest bucket",
    "by_source": "likeliest of its source",
    "by_length": "regression on its length",
    "another": "one text by another",
    "others": "one text by the others",
    "at_most": "no predictor above",
}


def _row(name: str, of: Mapping[str, Any]) -> str:
    cells = [f"{of[g]:{8 if g == '100' else 6}.3f}" for g in GRANULARITIES]
    cells += [f"{of[key]:6.{digits}f}" if key in of else " " * 6 for key, digits in _DIGITS]
    return " ".join([f"{name:24}", *cells]).rstrip()


_DIGITS = (("mae", 0), ("tau", 2), ("ece", 3), ("rps", 1))
