from pathlib import Path

import pytest

from tetri.bench.compare.arrangements import arrangements
from tetri.bench.compare.plan import START_S, Run, Wanted, seconds_left, started_together
from tetri.config import load

KNOWN = arrangements(load(Path(__file__).parents[3] / "conf" / "default.toml"))
CHOSEN = [KNOWN[name] for name in ("vllm-2-rr", "vllm-2-least", "tetri-auto")]


def wanted(workloads=("Mixed",), rates=("70%",), regimes=("balanced",), repeats=1):
    return Wanted(CHOSEN, workloads, rates, regimes, repeats)


def test_a_run_is_named_by_all_that_it_depends_on():
    assert str(Run("tetri-auto", "Mixed", "70%", "balanced", 2)) == "tetri-auto, Mixed at 70%, balanced, repeat 2"
    assert str(Run("vllm", "Mixed", "1.5", "", 1)) == "vllm, Mixed at 1.5/s, repeat 1"


def test_the_order_of_the_arrangements_alternates():
    runs = [*wanted(repeats=3).runs()]
    assert [run.arrangement for run in runs] == [
        *("vllm-2-rr", "vllm-2-least", "tetri-auto"),
        *("tetri-auto", "vllm-2-rr", "vllm-2-least"),
        *("vllm-2-rr", "vllm-2-least", "tetri-auto"),
    ]
    assert [run.repeat for run in runs] == [1] * 3 + [2] * 3 + [3] * 3


def test_only_who_knows_limits_runs_for_each():
    runs = [*wanted(regimes=("balanced", "tight-ttft")).runs()]
    assert [(run.arrangement, run.regime) for run in runs] == [
        ("vllm-2-rr", ""), ("vllm-2-least", ""), ("tetri-auto", "balanced"), ("tetri-auto", "tight-ttft"),
    ]  # fmt: skip


def test_everything_of_a_repeat_is_served_by_one_start():
    runs = [*wanted(("Mixed", "LPHD"), ("1", "2"), repeats=2).runs()]
    groups = started_together(runs, KNOWN)
    assert [(len(group), group[0].arrangement) for group in groups] == [
        (8, "vllm-2-rr"), (4, "tetri-auto"), (4, "tetri-auto"), (8, "vllm-2-rr"),
    ]  # fmt: skip
    assert sum(groups, []) == runs and len({*runs}) == len(runs)


@pytest.mark.parametrize(("starts", "start"), [([], START_S), ([20.0, 40.0], 30.0)])
def test_the_time_left(starts, start):
    groups = started_together([*wanted(repeats=2).runs()], KNOWN)
    assert seconds_left(groups, lambda run: 100.0, starts) == 4 * start + 600


def test_runs_with_the_same_requests():
    run = Run("tetri-auto", "Mixed", "70%", "balanced", 2)
    assert run.same_requests(Run("vllm", "Mixed", "70%", "", 1))
    assert not run.same_requests(Run("tetri-auto", "Mixed", "80%", "balanced", 2))
    assert not run.same_requests(Run("tetri-auto", "LPHD", "70%", "balanced", 2))
