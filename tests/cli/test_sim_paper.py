"""tetri-cli sim paper."""

import json

import pytest
from click.testing import CliRunner

from tetri import cost
from tetri.cli import sim_paper
from tetri.sim import paper, workloads

KEYS = {"workload", "system", "metric", "value", "paper"}


def told(*arguments):
    result = CliRunner().invoke(sim_paper.command, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def parsed(*arguments):
    made = json.loads(told("--json", *arguments))
    assert set(made.pop("run")) == {"wall_s"}
    return made


def test_the_same_command_gives_the_same_values_in_the_papers_form():
    made = parsed("--seeds", "1", "--only", "HPLD")
    assert made == parsed("--seeds", "1", "--only", "HPLD")
    assert [set(row) for row in made["rows"]] == [KEYS] * 25
    assert {row["system"] for row in made["rows"]} == set(paper.SYSTEMS)
    assert [row["metric"] for row in made["rows"][:5]] == list(paper.METRICS)
    assert len(made["ratios"]) == 3 and "microbenchmarks" not in made


def test_runs_on_all_cores_are_the_same_runs():
    made = parsed("--seeds", "4", "--only", "HPLD")  # as many runs as are spread over processes
    evaluation, table = workloads.load(), cost.load(sim_paper.COST)
    alone = [paper.measure("tetri-roce", evaluation, "HPLD", table, seed).jct_mean for seed in range(4)]
    row = next(row for row in made["rows"] if (row["system"], row["metric"]) == ("tetri-roce", "jct_mean"))
    assert row["value"] == pytest.approx(sum(alone) / 4) and row["paper"] == 6.244


def test_people_read_tables():
    text = told("--seeds", "1", "--only", "HPLD")
    assert "tetri-nvlink" in text and "(1.43)" in text and "microbenchmarks" not in text


def test_microbenchmarks_stand_beside_the_papers(monkeypatch):
    monkeypatch.setattr(sim_paper, "_all", lambda tasks: [fake(task) for task in tasks])
    made = parsed("--seeds", "9")
    figures = {point["figure"]: point for point in made["microbenchmarks"]}
    assert set(figures) == {"figure3", "figure4", "figure5", "figure16", "figure18", "figure19"}
    points = {(each["figure"], each["point"]): each for each in made["microbenchmarks"]}
    assert points["figure16", "fcfs-16"]["value"] == 2.0  # seeds 0 to 4
    assert points["figure16", "fcfs-16"]["paper"] == 5.029
    assert points["figure18", "peak-1"]["paper"] is None
    assert "figure18" in "\n".join(sim_paper.shown(made))


def fake(task):
    if len(task) == 2:
        return {"": float(task[1])}
    return paper.Measured(1.0, 2.0, 3.0, 4.0, 5, 2)


@pytest.mark.parametrize("wrong", [("--seeds", "0"), ("--seeds", "x"), ("--only", "LPXD"), ("--tea", "1")])
def test_a_wrong_argument_is_one_line(wrong):
    result = CliRunner().invoke(sim_paper.command, wrong)
    assert result.exit_code == 2 and result.output.strip().splitlines()[-1].startswith("Error: ")
