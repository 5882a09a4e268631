"""tetri-cli sim paper."""

import json

import pytest

from tetri import cost
from tetri.cli import sim_paper
from tetri.sim import paper, workloads

KEYS = {"workload", "system", "metric", "value", "paper"}


@pytest.fixture
def parsed(run):
    def parsed(*arguments):
        status, out, err = run("sim", "paper", "--json", *arguments)
        made = json.loads(out)
        assert (status, err, {*made.pop("run")}) == (0, "", {"wall_s"})
        return made

    return parsed


def test_the_same_command_gives_the_same_values_in_the_papers_form(parsed):
    made = parsed("--seeds", "1", "--only", "HPLD")
    assert made == parsed("--seeds", "1", "--only", "HPLD")
    assert [set(row) for row in made["rows"]] == [KEYS] * 25
    assert {row["system"] for row in made["rows"]} == set(paper.SYSTEMS)
    assert [row["metric"] for row in made["rows"][:5]] == list(paper.METRICS)
    assert len(made["ratios"]) == 3 and "microbenchmarks" not in made


def test_runs_on_all_cores_are_the_same_runs(parsed):
    made = parsed("--seeds", "4", "--only", "HPLD")  # as many runs as are spread over processes
    evaluation, table = workloads.load(), cost.load(sim_paper.COST)
    alone = [paper.measure("tetri-roce", evaluation, "HPLD", table, seed).jct_mean for seed in range(4)]
    row = next(row for row in made["rows"] if (row["system"], row["metric"]) == ("tetri-roce", "jct_mean"))
    assert row["value"] == pytest.approx(sum(alone) / 4) and row["paper"] == 6.244


def test_people_read_tables(run):
    _, text, _ = run("sim", "paper", "--seeds", "1", "--only", "HPLD")
    assert "tetri-nvlink" in text and "(1.43)" in text and "microbenchmarks" not in text


def test_microbenchmarks_stand_beside_the_papers(parsed, monkeypatch):
    def fake(task):
        return {"": float(task[1])} if len(task) == 2 else paper.Measured(1.0, 2.0, 3.0, 4.0, 5, 2)

    monkeypatch.setattr(sim_paper, "_all", lambda tasks: [fake(task) for task in tasks])
    made = parsed("--seeds", "9")
    points = {(each["figure"], each["point"]): (each["value"], each["paper"]) for each in made["microbenchmarks"]}
    assert {figure for figure, _ in points} == {f"figure{number}" for number in (3, 4, 5, 16, 18, 19)}
    assert points["figure16", "fcfs-16"] == (2.0, 5.029)  # seeds 0 to 4
    assert points["figure18", "peak-1"][1] is None
    assert "figure18" in "\n".join(sim_paper.shown(made))


@pytest.mark.parametrize("wrong", [("--seeds", "0"), ("--seeds", "x"), ("--only", "LPXD"), ("--tea", "1")])
def test_a_wrong_argument_is_one_line(run, wrong):
    status, out, err = run("sim", "paper", *wrong)
    assert (status, out, err.count("\n")) == (2, "", 1) and wrong[0] in err
