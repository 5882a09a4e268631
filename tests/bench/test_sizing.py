"""tools/check_sizing: what it says of a case, and when it fails."""

import json

import pytest

from tetri.bench import sizing
from tetri.bench.sizing import Case
from tetri.sim import pools

#: Half a second of steps; the simulated requests need no long outputs.
EASY = Case("v100-opt13b", 40, "100", "8", 0.3, 0.05)


@pytest.fixture
def check(monkeypatch, capsys):
    """`check_sizing` with these cases: (exit status, stdout, stderr)."""
    monkeypatch.setattr(pools, "REQUESTS", 500)
    monkeypatch.setattr(pools, "LONGER", (1,))

    def run(cases, *arguments):
        monkeypatch.setattr(sizing, "CASES", cases)
        with pytest.raises(SystemExit) as ended:
            sizing.main(["--requests", "150", *arguments], prog_name="check_sizing")
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_each_case_is_sized_and_simulated(check):
    status, out, err = check((EASY, EASY), "--json", "--case", "1")
    made = json.loads(out)
    assert (status, made["right"], made["ok"]) == (0, 1, True) and err.startswith("case 1: right")
    (case,) = made["cases"]
    assert (case["rate"], case["prompt"], case["ttft_s"]) == (40, "100", 0.3) and case["run"]["cpu_s"] > 0
    first, *fewer = case["simulated"]
    assert first["reached"] and fewer and not any(each["reached"] for each in fewer)
    assert {first["prefill"] + first["decode"] - each["prefill"] - each["decode"] for each in fewer} == {1}


def test_a_table_and_a_failure(check, monkeypatch):
    measured = sizing.measured

    def wrong(case, requests, seed):
        return {**measured(case, requests, seed), "ok": False}

    monkeypatch.setattr(sizing, "measured", wrong)
    status, out, _ = check((EASY,))
    assert status == 1 and "0 of 1 are right" in out
    head, row = out.splitlines()[:2]
    assert head.startswith("table") and row.startswith("v100-opt13b") and row.endswith("wrong")


def test_the_cases_are_many_and_differ():
    assert len({*sizing.CASES}) == len(sizing.CASES) >= 10
    assert {case.table for case in sizing.CASES} == {"v100-opt13b", "cpu-smollm2"}
