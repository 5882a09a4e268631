"""What a simulation tells, against sums made by hand."""

from tetri.request import Slo
from tetri.sim.clients import Outcome
from tetri.sim.instance import Use
from tetri.sim.report import SimResult, summary, table
from tetri.sim.traces import Arrival


def result(**changes):
    outcomes = [
        Outcome(Arrival(1.0, 10, 5), "done", ttft_s=1.0, jct_s=3.0, tpot_s=0.5, slo=Slo(ttft_s=1.5, tpot_s=0.5)),
        Outcome(Arrival(1.0, 10, 1), "done", ttft_s=2.0, jct_s=2.0, preempted=3, slo=Slo(ttft_s=1.5)),
        Outcome(Arrival(2.0, 10, 9), "failed", why="d0 was lost"),
        Outcome(Arrival(2.0, 99, 9), "refused", why="too long"),
    ]
    use = Use(busy_s={"prefill": 1.0, "decode": 2.0}, first_s=1.0, last_s=5.0, steps=7, roles=[(0.0, "mixed")])
    return SimResult(outcomes, {"m0": use}, {"steps": 7}, end_s=5.0, **changes)


def test_only_what_is_done_counts_for_metrics_and_rates():
    made = summary(result())
    assert [made[metric]["mean"] for metric in ("ttft", "jct", "tpot")] == [1.5, 2.5, 0.5]
    right = {"requests": 4, "done": 2, "failed": 1, "refused": 1, "counters": {"steps": 7}, "preempted_requests": 1}
    right |= {"makespan_s": 4.0, "requests_per_s": 0.5, "output_tokens_per_s": 1.5}
    right |= {"why": {"d0 was lost": 1, "too long": 1}}
    assert {name: made[name] for name in right} == right and "faults" not in made
    (instance,) = made["instances"]
    assert (instance["busy"], instance["steps"], instance["roles"]) == (0.75, 7, [[0.0, "mixed"]])


def test_attainment_is_the_share_of_all_requests_that_keep_both_limits():
    slo = summary(result())["slo"]
    assert slo == {
        **{"ttft_s": 1.5, "tpot_s": 0.5, "attainment": 0.25, "goodput_per_s": 0.25},
        "results": {"met": 1, "ttft": 1, "tpot": 0, "both": 0, "failed": 2},
    }
    says = "ttft 1.5, tpot 0.5 (medians): 25.0% kept, goodput 0.25 requests/s; missed: 1 ttft, 2 failed"
    assert f"limits    {says}" in table(summary(result())).splitlines()


def test_requests_without_limits_keep_them():
    made = result()
    made.outcomes = [Outcome(Arrival(1.0, 10, 5), "done", ttft_s=1e9, jct_s=1e9, tpot_s=1e9)]
    slo = summary(made)["slo"]
    assert (slo["ttft_s"], slo["tpot_s"], slo["attainment"]) == (None, None, 1.0)


def test_the_table_says_the_same_in_lines():
    lines = table(summary(result(faults={"drop": 3}))).splitlines()
    assert lines[0] == "requests  4: 2 done, 1 failed, 1 refused"
    assert lines[2].split()[:2] == ["ttft", "1.5"]
    assert "1 x d0 was lost" in lines and "1 x too long" in lines
    assert ["m0", "75.0%", "7"] in [line.split()[:3] for line in lines]
    assert lines[-2:] == ["injected faults: 3 x drop", "promises: all held"]


def test_of_many_instances_there_is_one_line_a_role():
    made = result()
    made.instances = {
        f"{role}{n}": Use(steps=1, roles=[(0.0, role)]) for role in ("prefill", "decode") for n in range(9)
    }
    rows = [line.split()[:4] for line in table(summary(made)).splitlines()]
    assert ["all", "prefill", "0.0%", "9"] in rows and ["all", "decode", "0.0%", "9"] in rows


def test_a_metric_that_no_request_has_is_null():
    made = result()
    made.outcomes = made.outcomes[2:]
    found = summary(made)
    assert (found["ttft"], found["requests_per_s"]) == (None, 0.0)
    assert "ttft" in table(found)
