"""Hundreds of requests while everything goes wrong on the way of their KV: a short form of tools/chaos, on each path.
Rates are high, so that every fault happens; which requests they hit is chance, and every answer must be right."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tetri.faults import KINDS

CHAOS = Path(__file__).parents[2] / "tools" / "chaos"
# What takes a whole attempt (lose, spoil, die) is so rare that no request meets it in all of its eight: measured, one
# attempt in four of prompts of 13 chunks and more, which are three in a run. At two to three times these rates it is
# more than half of those, and one run in eight has to give up a request.
FAULTS = (
    "drop=0.03,duplicate=0.03,delay=0.03,reorder=0.03,replay=0.03,"
    "flip=0.05,truncate=0.05,lose=0.01,late=0.05,spoil=0.01,die=0.0015,longest=0.1"
)
REQUESTS = 400


def chaos(*options: str) -> tuple[dict[str, Any], int]:
    """One run, and its exit status."""
    done = subprocess.run([CHAOS, "--json", *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.returncode


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[dict[str, Any], int]]:
    asked = ("--requests", str(REQUESTS), "--width", "24", "--faults", FAULTS)
    salts = {"shm": "false", "stream": "true"}  # with salt, who wrote each token is checked too
    return {path: chaos(*asked, "--transport", path, "--set", f"emulated.salt={salts[path]}") for path in salts}


@pytest.mark.parametrize("path", ["shm", "stream"])
def test_under_every_fault_all_answers_are_right_and_nothing_hangs_or_is_left(runs, path: str) -> None:
    run, status = runs[path]
    for problem in ("wrong", "hung", "leaked", "errors", "given_up"):
        assert not run[problem], run
    assert (run["crashes"], status) == (0, 0), run
    assert [kind for kind in KINDS if kind != "die" and not run["injected"][kind]] == [], "it never happened"
    seen = run["seen"]
    assert [name for name in ("duplicate", "late", "reordered", "truncated", "flipped", "lost") if not seen[name]] == []
    assert seen["healed"] and seen["refetched"] and seen["given_up"] and run["broker"]["restarts"]
    assert sum(run["attempts"].values()) == REQUESTS > run["attempts"]["1"]
    ended = sum(count for name, count in run["broker"].items() if name.startswith("ended_"))
    assert ended > REQUESTS, "none had several choices"


def test_instances_that_do_both_lose_nothing_either() -> None:
    """A request stays where its prompt was computed, or moves for want of memory or from a prefill instance."""
    shape = ("--workers", "1", "1", "2", "--set", "emulated.salt=true")
    run, status = chaos("--requests", str(REQUESTS), "--width", "24", "--faults", FAULTS, *shape)
    assert not any(run[problem] for problem in ("wrong", "hung", "leaked", "errors", "given_up")), run
    assert (run["crashes"], status) == (0, 0), run
    assert run["workers"] == [1, 1, 2] and run["injected"]["drop"] and run["broker"]["restarts"]


def test_workers_died_in_the_middle_and_came_back(runs) -> None:
    died = sum(run["injected"]["die"] for run, _ in runs.values())
    assert 0 < died <= sum(run["broker"].get("workers_lost", 0) for run, _ in runs.values())


def test_without_digests_the_same_faults_give_wrong_tokens() -> None:
    """Which proves that the run can fail, and that the digest is what guards it."""
    run, status = chaos("--requests", "40", "--faults", "flip=0.3", "--set", "transfer.digest=false")
    assert status == 1 and run["wrong"] and not run["ok"]
    assert not (run["hung"] or run["leaked"] or run["crashes"] or run["errors"])
