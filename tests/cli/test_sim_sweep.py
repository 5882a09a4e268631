"""tetri-cli sim sweep."""

import json

import pytest

from tetri.sim.sweep import cases as sources
from tetri.sim.sweep import sweep as sweeps
from tetri.sim.sweep.store import StoreError

ONE = ("sim", "sweep", "--case", "LPLD/v100-opt13b/2/balanced", "--jobs", "1", "--requests", "60")
NOTE = "without a --trace there are no cases of recorded requests"


def test_a_case_is_reported_and_another_sweep_reads_what_is_known(run, tmp_path):
    out, plot = str(tmp_path / "sweep.jsonl"), tmp_path / "sweep.png"
    status, text, err = run(*ONE, "--out", out, "--plot", str(plot))
    assert status == 0 and NOTE in err and plot.read_bytes().startswith(b"\x89PNG")
    assert "LPLD/v100-opt13b/2/balanced" in text and "mean of auto / best fixed" in text
    known = (tmp_path / "sweep.jsonl").read_bytes()
    status, text, _ = run(*ONE, "--out", out, "--json")
    made = json.loads(text)
    assert status == 0 and (tmp_path / "sweep.jsonl").read_bytes() == known
    (case,) = made["cases"]
    assert case["requests"] == 60 and case["ratio"] > 0.3 and len(case["arrangements"]) == 3 * 3 + 1
    assert {check["promise"]: check["cases"] for check in made["checks"]}["mean of auto / best fixed"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--case", "unknown/*"), "no case has such a name"),
        (("--instances", "3"), "--instances must be of 2, 4, 8, 32, got 3"),
        (("--trace", "/nowhere.csv"), "/nowhere.csv: cannot be read"),
    ],
)
def test_what_cannot_be_swept_is_said(run, options, said):
    status, out, err = run("sim", "sweep", *options)
    assert status == 2 and out == "" and said in err


@pytest.mark.parametrize(("held_back", "share"), [("without", 2 / 3), ("only", 1 / 3), ("with", 1)])
def test_a_third_of_the_cases_is_held_back(run, monkeypatch, held_back, share):
    asked = []

    def sweep(cases, path, processes, progress):
        asked.extend(cases)
        raise StoreError("enough")

    monkeypatch.setattr(sweeps, "sweep", sweep)
    assert run("sim", "sweep", "--held-back", held_back)[0] == 2
    assert len(asked) == pytest.approx(share * len(sources.cases()), rel=0.15)
