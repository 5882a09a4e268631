"""gpu_check: check the KV path cuda_ipc on the GPUs of this machine and measure its speed. Runs all tests marked `gpu`
and prints what they measured and whether the bytes and the model's tokens were equal.

Exit status 0: every test that could run passed. Without a GPU: status 1 and one line that says what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path
from typing import Any

import click

from tetri.bench.deployment import REPOSITORY
from tetri.bench.report import Program, as_json, give, table
from tetri.kv.base import KVError
from tetri.kv.cuda.runtime import load

STAND_IN, ROWS = "TETRI_CUDA_STAND_IN", "TETRI_GPU_ROWS"  # tests/kv/cuda/gpus.py
HOUR_S = 3600
Outcome = tuple[str, str, str]  # file, "passed", "failed" or "skipped", the reason


def run_tests(stand_in: str | None, deselected: list[str]) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """Run the tests; return the rows that they reported and the outcome of each test. Raises ClickException."""
    with tempfile.TemporaryDirectory() as folder:
        rows, report = Path(folder, "rows"), Path(folder, "report.xml")
        environment = {**os.environ, ROWS: str(rows), **({STAND_IN: stand_in} if stand_in else {})}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [f"--deselect={test}" for test in deselected]
        files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
        command += [str(path) for path in files if "mark.gpu" in path.read_text("utf-8")]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=HOUR_S, check=False
        )
        if not report.exists():
            raise click.ClickException(f"pytest did not run: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        reported = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
        return [json.loads(row) for row in reported], outcomes(report)


def outcomes(report: Path) -> list[Outcome]:
    """Return the outcomes in a JUnit report of pytest."""
    found = []
    for case in xml.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skipped = case.find("skipped")
        if bad is not None:
            found.append((name, "failed", (bad.get("message") or "").splitlines()[0][:200]))
        elif skipped is not None:
            found.append((name, "skipped", skipped.get("message") or ""))
        else:
            found.append((name, "passed", ""))
    return found


def shown(rows: list[dict[str, Any]]) -> str:
    """Format the reported rows as a table."""
    cells = []
    for row in rows:
        timed = "chunk_mb" in row
        cells.append(
            (
                row["check"],
                row["device"],
                f"{row['chunk_mb']:g} MB" if timed else "",
                ("on" if row["digest"] else "off") if timed else "",
                f"{row['take_ms']:.2f} ms" if timed else "",
                f"{row['gbps']:.1f} GB/s" if timed else "",
                f"{row['copy_gbps']:.1f} GB/s" if timed else "",
                "yes" if row["equal"] else "NO",
            )
        )
    return table(("check", "device", "chunk", "digest", "latency", "bandwidth", "plain copy", "equal"), cells)


def summary(found: list[Outcome]) -> list[str]:
    """Return lines with the counts, each failure, and each reason for a skip once."""
    counts = Counter(outcome for _, outcome, _ in found)
    lines = [f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"]
    lines += [f"failed: {name}: {reason}" for name, outcome, reason in found if outcome == "failed"]
    reasons = Counter(reason for _, outcome, reason in found if outcome == "skipped")
    return lines + [f"skipped {count}: {reason}" for reason, count in reasons.items()]


@click.command(cls=Program, help=__doc__)
@as_json
@click.option("--stand-in", type=click.Path(file_okay=False, exists=True), hidden=True, help="Tries the check itself.")
@click.option("--deselect", multiple=True, help="A test to leave out, by its pytest id.")
def main(as_json: bool, stand_in: str | None, deselect: tuple[str, ...]) -> None:
    """Run the check."""
    if stand_in is None:
        try:
            load()
        except KVError as error:
            give({"problem": str(error), "rows": [], "tests": {}, "ok": False}, f"gpu_check: {error}", as_json)
            sys.exit(1)
    rows, found = run_tests(stand_in, list(deselect))
    tests = {name: {"outcome": outcome, "reason": reason} for name, outcome, reason in found}
    kinds = {outcome for _, outcome, _ in found}
    ok = "passed" in kinds and "failed" not in kinds
    text = "\n".join([shown(rows), "", *summary(found)])
    give({"problem": None, "rows": rows, "tests": tests, "ok": ok}, text, as_json)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main(prog_name="gpu_check")
