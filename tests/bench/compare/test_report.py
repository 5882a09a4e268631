"""The report of made-up runs, from the store to the words."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tetri import cost
from tetri.bench.compare import report
from tetri.bench.compare.arrangements import Arrangement, arrangements
from tetri.bench.compare.compare import GIVEN, SERVED, Bench
from tetri.bench.compare.load import Answer
from tetri.bench.compare.plan import Run, Wanted
from tetri.bench.compare.store import Capacity, Record, Store, Table
from tetri.bench.compare.traffic import Workload
from tetri.config import load
from tetri.request import Slo

CONF = Path(__file__).parents[3] / "conf" / "default.toml"
CONFIG = load(CONF)
KNOWN = arrangements(CONFIG)
NAMES = ("vllm-2-least", "vllm-2-512-least", "tetri-1+1", "tetri-mixed", "tetri-auto")
SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def answers(ttft_s, tpot_s, count=20):
    """Requests that are a little different from each other, so far apart that each is alone."""
    varied = [0.9 + 0.2 * (7 * number % count) / count for number in range(count)]
    return [
        Answer(2.5 * number, ttft_s * each, ttft_s * each + tpot_s * each * 19, 512, 20)
        for number, each in enumerate(varied)
    ]


@pytest.fixture
def bench(tmp_path):
    """A bench whose runs are made up; `add` adds one for each repeat."""
    store = Store(tmp_path / "runs.jsonl", {})
    for deployment in {SERVED, *(each.deployment for each in KNOWN.values() if each.servers)}:
        store.add(Table(deployment, cost.load("cpu-smollm2")))
    store.add(Capacity("Mixed", 2.0))
    made = Bench(
        CONF, (), CONFIG, tmp_path, KNOWN, {name: Workload(name, 2048) for name in ("Mixed", "LPLD")}, 1000, 20, 0, SLO,
        store, SimpleNamespace(advice=lambda: "sysctl"), print,
    )  # fmt: skip
    return made


def add(bench, name, ttft_s, tpot_s, workload="Mixed", rate="70%", repeats=2, **more):
    for repeat in range(1, repeats + 1):
        regime = GIVEN if name.startswith(("tetri", "url")) else ""
        run = Run(name, workload, rate, regime, repeat)
        made = [] if "error" in more else answers(ttft_s, tpot_s)
        bench.store.add(Record(run, 1.4, made, 60.0, 0.05, (0.01, 0.2, 0.3), **more))


def wanted(names=NAMES, rates=("70%",), workloads=("Mixed",)):
    return Wanted([KNOWN[name] for name in names], workloads, rates, [GIVEN], 2)


def filled(bench):
    """auto is the best in all, but for the first token, which one vLLM server brings sooner."""
    for name, ttft_s, tpot_s in zip(NAMES, (0.5, 0.7, 1.5, 0.8, 0.6), (0.12, 0.09, 0.06, 0.08, 0.06), strict=True):
        add(bench, name, ttft_s, tpot_s)
    return report.findings(bench, wanted())


def test_values_of_each_arrangement(bench):
    found = filled(bench)
    (cell,) = found["cells"]
    assert (cell["workload"], cell["rate"], cell["rate_s"], cell["ttft_s"]) == ("Mixed", "70%", 1.4, 1.0)
    row = cell["arrangements"]["tetri-auto"]
    measured = row["measured"]
    assert measured["TTFT mean"] == pytest.approx(0.6, rel=0.02) and measured["attained"] == 1.0
    assert measured["TPOT p99"] == pytest.approx(0.06 * 1.09, rel=0.01)
    assert (row["client_cpu"], row["gap_p99_s"], row["gap_longest_s"], row["failed"]) == (0.05, 0.2, 0.3, 0)
    assert len(row["repeats"]) == 2 and row["repeats"][0] == pytest.approx(measured, rel=0.01)
    assert cell["arrangements"]["vllm-2-least"]["measured"]["attained"] == 0.0  # each token takes too long
    json.dumps(found, allow_nan=False)


def test_beside_each_value_what_the_simulator_says(bench):
    table = cost.load("cpu-smollm2")
    row = filled(bench)["cells"][0]["arrangements"]["tetri-auto"]
    assert row["predicted"]["TTFT mean"] == pytest.approx(table.prompt_s(512, 0, 512), rel=0.05)
    assert row["predicted"]["attained"] == 1.0


def test_ratios_are_against_each_other_arrangement(bench):
    against = filled(bench)["cells"][0]["against"]["tetri-auto"]
    assert {*against} == {*NAMES} - {"tetri-auto"}
    assert against["vllm-2-least"]["TTFT mean"]["value"] == pytest.approx(1.2)
    assert against["vllm-2-512-least"]["TPOT p99"]["high"] == pytest.approx(2 / 3)
    assert against["tetri-1+1"]["attained"]["value"] == pytest.approx(1.0)


def test_the_better_rival_counts_for_each_metric(bench):
    (cell,) = filled(bench)["cells"]
    rivals = NAMES[:2]
    named = {metric.name: metric for metric in report.METRICS}
    assert report.better(named["TTFT mean"], rivals, cell) == "vllm-2-least"
    assert report.better(named["TPOT p99"], rivals, cell) == report.better(named["attained"], rivals, cell) == NAMES[1]


def test_verdicts(bench):
    verdicts = filled(bench)["verdicts"]
    assert "tetri-auto is best or equal in attained in 1 of 1: Mixed 70% given" in verdicts
    assert "tetri-auto is best or equal in TTFT mean: nowhere" in verdicts
    assert "phases kept apart all the time attain more than any coupled arrangement: nowhere" in verdicts


def test_where_separation_helps(bench):
    for workload, split_ttft_s in (("Mixed", 0.5), ("LPLD", 1.5)):
        for name, ttft_s in zip(NAMES, (1.5, 1.5, split_ttft_s, 1.5, 1.5), strict=True):
            add(bench, name, ttft_s, 0.05, workload)
    bench.store.add(Capacity("LPLD", 2.0))
    verdicts = report.findings(bench, wanted(workloads=("Mixed", "LPLD")))["verdicts"]
    assert verdicts[-1] == (
        "phases kept apart all the time attain more than any coupled arrangement in 1 of 2: Mixed 70% given; not in"
        " LPLD 70% given"
    )
    assert "tetri-auto is best or equal in attained in 1 of 2: LPLD 70% given; not in Mixed 70% given" in verdicts


def test_a_crash_is_a_row(bench):
    add(bench, "vllm-2-least", 0.0, 0.0, error="the vLLM server ended")
    add(bench, "tetri-auto", 0.5, 0.05)
    found = report.findings(bench, wanted(("vllm-2-least", "tetri-auto", "tetri-mixed")))
    (cell,) = found["cells"]
    assert cell["arrangements"]["vllm-2-least"] == {"error": "the vLLM server ended"}
    assert cell["arrangements"]["tetri-mixed"] == {"error": "it has not run"}
    assert cell["against"] == {"tetri-auto": {}}
    text = report.shown(found)
    assert "vllm-2-least: the vLLM server ended" in text and "tetri-mixed: it has not run" in text


def test_one_repeat_that_crashed_leaves_the_values_of_the_others_and_no_comparison(bench):
    add(bench, "tetri-auto", 0.5, 0.05)
    add(bench, "vllm-2-least", 0.5, 0.05, repeats=1)
    bench.store.add(Record(Run("vllm-2-least", "Mixed", "70%", "", 2), 1.4, error="gone"))
    (cell,) = report.findings(bench, wanted(("vllm-2-least", "tetri-auto")))["cells"]
    row = cell["arrangements"]["vllm-2-least"]
    assert (row["error"], len(row["repeats"]), cell["against"]["tetri-auto"]) == ("gone", 1, {})


def test_requests_that_failed_are_counted_and_say_why(bench):
    broken = answers(0.5, 0.05)
    broken[3].error = "status 503"
    bench.store.add(Record(Run("tetri-auto", "Mixed", "70%", GIVEN, 1), 1.4, broken, 60.0))
    (cell,) = report.findings(bench, Wanted([KNOWN["tetri-auto"]], ["Mixed"], ["70%"], [GIVEN], 1))["cells"]
    row = cell["arrangements"]["tetri-auto"]
    assert (row["failed"], row["error"], row["measured"]["attained"]) == (1, "status 503", 0.95)


def test_a_repeat_in_which_the_machine_stood_still_is_said(bench):
    add(bench, "tetri-auto", 0.5, 0.05, standstill_s=2.25)
    add(bench, "tetri-mixed", 0.5, 0.05)
    found = report.findings(bench, wanted(("tetri-auto", "tetri-mixed")))
    said = [line for line in report.shown(found).splitlines() if "stood still" in line]
    assert said == ["tetri-auto: in some repeat the machine stood still, for up to 2.2 s"]


def test_what_cannot_be_simulated_is_said(bench):
    """A request that no simulated server holds does not cost the whole report."""
    deployment = KNOWN["vllm-2-least"].deployment
    bench.store.tables[deployment] = [Table(deployment, replace(cost.load("cpu-smollm2"), kv_tokens=100))]
    add(bench, "vllm-2-least", 0.5, 0.05)
    found = report.findings(bench, wanted(("vllm-2-least",)))
    row = found["cells"][0]["arrangements"]["vllm-2-least"]
    assert row["predicted"]["JCT mean"] is None and "512 + 20 tokens" in row["not_predicted"]
    assert "vllm-2-least: not simulated: request 1: 512 + 20 tokens" in report.shown(found)


def test_servers_that_run_already_are_not_predicted(bench):
    url = Arrangement("url", "http://a", urls=("http://a",))
    add(bench, "url", 0.5, 0.05)
    found = report.findings(bench, Wanted([url], ["Mixed"], ["70%"], [GIVEN], 2))
    assert found["cells"][0]["arrangements"]["url"]["predicted"]["TTFT mean"] is None
    assert found["predictions"]["TTFT mean"]["of"] == 0
    assert "  0.497 (-)  " in report.shown(found)


def test_the_accuracy_of_the_simulator(bench):
    add(bench, "tetri-auto", cost.load("cpu-smollm2").prompt_s(512, 0, 512), 0.05)
    add(bench, "tetri-mixed", 10.0, 0.05)
    made = report.findings(bench, wanted(("tetri-auto", "tetri-mixed")))["predictions"]["TTFT mean"]
    assert (made["limit"], made["within"], made["of"]) == (0.10, 1, 2)
    assert made["worst"]["where"] == "tetri-mixed, Mixed at 70%, given" and made["worst"]["off"] < -0.9


def test_the_accuracy_counts_every_regime(bench):
    for regime in ("balanced", "tight-ttft"):
        run = Run("tetri-auto", "Mixed", "70%", regime, 1)
        bench.store.add(Record(run, 1.4, answers(0.5, 0.05), 60.0, 0.05, (0.01, 0.2, 0.3)))
    both = Wanted([KNOWN["tetri-auto"]], ("Mixed",), ("70%",), ["balanced", "tight-ttft"], 1)
    assert report.findings(bench, both)["predictions"]["JCT mean"]["of"] == 2


def test_the_highest_rate_that_attains_90_percent(bench):
    for rate, ttft_s in (("50%", 0.5), ("70%", 0.99), ("90%", 2.0)):
        add(bench, "tetri-auto", ttft_s, 0.05, rate=rate)
    found = report.findings(bench, wanted(("tetri-auto",), ("50%", "70%", "90%")))
    (goodput,) = found["goodput"]
    assert goodput["rate_s"]["tetri-auto"] == pytest.approx(1.0 + 0.4 * 0.1 / 0.45, abs=0.05)
    assert "90 % attained, Mixed, given: tetri-auto 1." in report.shown(found)


def test_the_text_has_a_table_of_values_and_one_of_ratios(bench):
    text = report.shown(filled(bench))
    lines = text.splitlines()
    assert lines[0] == ("Mixed at 1.4 requests/s (70%), given: TTFT <= 1 s, TPOT <= 100 ms; in brackets: simulated")
    assert [line.split()[0] for line in lines[2:7]] == [*NAMES]
    assert "against the better of vllm-2-least and vllm-2-512-least" in lines[7]
    (row,) = [line for line in lines[8:] if line.startswith("tetri-auto ") and "to" in line and "best" not in line]
    assert row.split("  ")[1].strip().startswith("1.20 (1.20 to 1.20)") and "+100.0" not in row
    assert "sysctl" in lines and lines[-1].startswith("phases kept apart all the time")


def test_the_times_that_are_drawn(bench):
    filled(bench)
    ((title, metrics),) = report.times(bench, wanted())
    assert title == "Mixed at 70%" and [*metrics] == ["TTFT", "TPOT", "JCT"]
    assert {name: len(values) for name, values in metrics["JCT"].items()} == dict.fromkeys(NAMES, 40)


def test_of_several_rates_the_times_at_the_highest_are_drawn(bench):
    for rate, ttft_s in (("50%", 0.5), ("90%", 2.0), ("70%", 0.9)):
        add(bench, "tetri-auto", ttft_s, 0.05, rate=rate)
    ((title, _),) = report.times(bench, wanted(("tetri-auto",), ("50%", "90%", "70%")))
    assert title == "Mixed at 90%"
