"""Comparisons over played servers, and over emulated deployments."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tetri import cost
from tetri.bench.compare import compare as module
from tetri.bench.compare.arrangements import Arrangement
from tetri.bench.compare.awake import Awake
from tetri.bench.compare.compare import GIVEN, IN_FLIGHT, INSTANCE, SERVED, TRIES, WARM_UP, Bench, compare, rate_of
from tetri.bench.compare.plan import Run, Wanted
from tetri.bench.compare.served_cost import PROMPTS, Seen
from tetri.bench.compare.store import Capacity, Record, Store, Table
from tetri.bench.compare.traffic import Workload
from tetri.bench.report import BenchError
from tetri.config import load
from tetri.cost import Cost
from tetri.proc import build
from tetri.request import Slo

CONF = Path(__file__).parents[3] / "conf" / "emulated.toml"
SETTINGS = ("engine.cost=cpu-smollm2.toml",)
LIMITS = Slo(ttft_s=5.0, tpot_s=1.0)


class Watch:
    """In place of Awake: tells of these standstills in turn."""

    def __init__(self, *found):
        self.found = [*found]

    def standstills(self):
        return self.found.pop(0) if self.found else []

    def advice(self):
        return None


def played(name, url):
    return Arrangement(name, name, urls=(url,))


@pytest.fixture
def bench(tmp_path):
    """A function that makes a bench of these arrangements; `notes` has its progress."""

    def make(*arrangements, requests=6, awake=None):
        store = Store(tmp_path / "runs.jsonl", {})
        store.read()
        made = Bench(
            CONF, SETTINGS, load(CONF, SETTINGS), tmp_path, {each.name: each for each in arrangements},
            {"LPLD": Workload("LPLD", 2048)}, 1000, requests, 0, LIMITS, store, awake or Watch(), make.notes.append,
        )  # fmt: skip
        return made

    make.notes = []
    return make


def wanted(bench, rates=("50",), repeats=1):
    return Wanted([*bench.arrangements.values()], ["LPLD"], rates, [GIVEN], repeats)


def test_every_run_is_made_once_and_kept(serve, bench):
    (one, first), (two, second) = serve(), serve()
    made = bench(played("a", first), played("b", second))
    compare(made, wanted(made, repeats=2), "a")
    assert {str(run) for run in made.store.records} == {
        f"{name}, LPLD at 50/s, given, repeat {repeat}" for name in "ab" for repeat in (1, 2)
    }
    for record in made.store.records.values():
        assert len(record.served) == 6 and record.rate_s == 50 and record.seconds > 0 and not record.error
    asked = len(one.bodies)
    assert asked == len(two.bodies) > 12  # the warm-up too
    compare(bench(played("a", first), played("b", second)), wanted(made, repeats=2), "a")  # of the file's runs, none
    assert len(one.bodies) == asked


def test_all_arrangements_get_the_same_requests_but_for_the_tokens(serve, bench):
    (one, first), (two, second) = serve(), serve()
    made = bench(played("a", first), played("b", second))
    compare(made, wanted(made), "a")
    ours, theirs = ([body for body in each.bodies if body["max_tokens"] != 8] for each in (one, two))
    shapes = [[(len(body["prompt"]), body["max_tokens"]) for body in each] for each in (ours, theirs)]
    assert shapes[0] == shapes[1] and ours[0]["prompt"] != theirs[0]["prompt"]
    assert one.headers[-1]["X-SLO-TTFT-Ms"] == "5000.000" and one.headers[-1]["X-SLO-TPOT-Ms"] == "1000.000"


def test_a_share_is_of_the_capacity_which_is_measured_once(serve, bench):
    server, url = serve()
    server.hold = lambda: WARM_UP < len(server.bodies) < WARM_UP + IN_FLIGHT
    made = bench(played("a", url))
    compare(made, wanted(made, rates=("10%", "20%")), "a")
    capacity = made.store.capacities["LPLD"]
    assert server.most == IN_FLIGHT and capacity > 0
    assert rate_of(made, "LPLD", "20%") == pytest.approx(capacity / 5)
    rates = sorted(record.rate_s for record in made.store.records.values())
    assert rates == pytest.approx([capacity / 10, capacity / 5])


def test_a_run_in_which_the_machine_stood_still_runs_again(serve, bench):
    _, url = serve()
    # Of each run first what was before it, then its own.
    made = bench(played("a", url), awake=Watch([9.0], [0.5, 2.5], [], [0.4], [], []))
    compare(made, wanted(made), "a")
    (record,) = made.store.records.values()
    assert record.standstill_s == 0.0
    assert [note for note in bench.notes if "stood still" in note] == [
        f"the machine stood still for {seconds} s: again a, LPLD at 50/s, given, repeat 1" for seconds in (2.5, 0.4)
    ]


def test_after_some_tries_a_disturbed_run_is_kept_as_one(serve, bench):
    _, url = serve()
    made = bench(played("a", url), awake=Watch(*[[1.5]] * 2 * TRIES))
    compare(made, wanted(made), "a")
    assert [record.standstill_s for record in made.store.records.values()] == [1.5]


def test_one_arrangement_that_crashes_is_a_row_and_not_the_end(serve, bench):
    _, url = serve()
    made = bench(played("a", "http://127.0.0.1:9"), played("b", url))
    compare(made, wanted(made, rates=("50", "60")), "b")
    records = made.store.records
    for rate in ("50", "60"):
        crashed = records[Run("a", "LPLD", rate, GIVEN, 1)]
        assert "http://127.0.0.1:9 does not answer: ClientConnectorError" in crashed.error and crashed.answers == []
        assert len(records[Run("b", "LPLD", rate, GIVEN, 1)].served) == 6
    assert len([note for note in bench.notes if note.startswith("a: ")]) == 1


def test_what_a_crash_had_answered_before_is_kept(serve, bench, monkeypatch):
    _, url = serve()
    made, run = bench(played("a", url)), module._run

    def crash(bench, run_, urls, attempt, done=[]):  # noqa: B006
        done.append(run_)
        if len(done) == 2:
            raise BenchError("the server has ended")
        return run(bench, run_, urls, attempt)

    monkeypatch.setattr(module, "_run", crash)
    compare(made, wanted(made, rates=("50", "60", "70")), "a")
    errors = [made.store.records[Run("a", "LPLD", rate, GIVEN, 1)].error for rate in ("50", "60", "70")]
    assert errors == ["", "the server has ended", "the server has ended"]


def test_requests_that_fail_are_counted(serve, bench):
    server, url = serve()
    server.fail = lambda body: "status" if body["max_tokens"] != 8 and len(server.bodies) % 2 else None
    made = bench(played("a", url))
    compare(made, wanted(made), "a")
    (record,) = made.store.records.values()
    assert len(record.answers) == 6 and len(record.served) == 3
    assert ", 3 failed: status 503" in bench.notes[-1]


def test_no_capacity_is_the_end(serve, bench):
    server, url = serve()
    server.fail = lambda body: None if body["max_tokens"] == 8 else "status"
    made = bench(played("a", url))
    with pytest.raises(BenchError, match="a has no capacity for LPLD: status 503"):
        compare(made, wanted(made, rates=("50%",)), "a")


def test_the_limits_of_a_regime_come_from_the_cost_table(bench):
    made, table = bench(), cost.load("cpu-smollm2")
    made.store.add(Capacity("LPLD", 1.0))
    prompt = made.workloads["LPLD"].p90_prompt
    chunk = made.config.engine.chunk_tokens
    for regime, ttft, tpot in (("balanced", 6, 3), ("tight-ttft", 3, 6), ("tight-tpot", 12, 2)):
        slo = made.slo("LPLD", regime)
        assert slo.ttft_s == pytest.approx(ttft * table.prompt_s(prompt, 0, chunk))
        assert slo.tpot_s == pytest.approx(tpot * table.decode_s(1, prompt))
    assert made.slo("LPLD", GIVEN) == LIMITS


MEASURE = """
import sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(given["--out"])
out.with_suffix(".begun").touch()
end = time.monotonic() + 20
while len([*out.parent.glob("*.begun")]) < 2 and time.monotonic() < end:  # the others measure at the same time
    time.sleep(0.01)
if given["--set"] != "engine.max_batch=8" or time.monotonic() >= end:
    sys.exit("something is wrong\\nand this is the reason")
cpu = given["--cpus"].removeprefix("+")
out.write_text(f"prefill = [[1, 0.{cpu}1]]\\ndecode = [[1, 0.02]]\\n")
"""


def test_the_instances_are_measured_at_the_same_time(bench, monkeypatch):
    monkeypatch.setattr(module, "PROFILE", (sys.executable, "-c", MEASURE))
    default = CONF.with_name("default.toml")
    made = replace(bench(), conf=default, settings=("engine.max_batch=8",), config=load(default))
    assert made.instance_cost().prefill == ((1.0, 0.01),)  # the first one's
    assert made.store.tables == {INSTANCE: [Table(INSTANCE, made.instance_cost())]}
    assert bench.notes == ["measuring the cost table of an instance, beside the others"]


def test_a_table_that_cannot_be_measured_is_said(bench, monkeypatch):
    monkeypatch.setattr(module, "PROFILE", (sys.executable, "-c", MEASURE))
    default = CONF.with_name("default.toml")
    with pytest.raises(BenchError, match="no cost table: and this is the reason"):
        replace(bench(), conf=default, settings=("engine.max_batch=9",), config=load(default)).instance_cost()


OWN = Cost(((1, 0.008), (512, 0.416)), ((1, 0.01), (8, 0.02)), kv_token_bytes=1 << 20)
STEPS = {1: 0.02, 4: 0.026, 16: 0.05, 32: 0.08}


@pytest.fixture
def measuring(bench, monkeypatch):
    """A bench whose servers take longer each time. `asked`: of which servers, and how many instances."""

    def seen(urls, instances, model, draw):
        asked.append((urls, instances, len({*draw(50)}) > 1))
        slower = len(asked)
        prompts = {tokens: slower * OWN.prompt_s(tokens, 0, 512) for tokens in PROMPTS}
        return Seen(prompts, {batch: slower * seconds for batch, seconds in STEPS.items()}, 1.0)

    asked = []
    monkeypatch.setattr(module, "seen", seen)
    default = CONF.with_name("default.toml")
    made = replace(bench(), conf=default, settings=(), config=load(default))
    made.store.add(Table(INSTANCE, OWN))
    return made, asked


def test_each_start_of_vllm_is_measured_and_the_mean_counts(measuring):
    made, asked = measuring
    rival = Arrangement("vllm-2-rr", "", servers=2)
    assert made.table(rival) is None
    for arrangement in (rival, replace(rival, routing="least")):
        made.measure(arrangement, ["u", "v"])
    assert asked == [(["u", "v"], 2, True)] * 2
    found = made.table(rival)
    assert found.cost.decode_s(1, 0) == pytest.approx(0.03) and (found.cost.kv_tokens, found.delay_s) == (1024, 0.0)
    assert made.table(replace(rival, chunk=512)) is None


def test_one_server_has_the_memory_of_all(measuring):
    made, asked = measuring
    one = Arrangement("vllm", "", servers=1)
    made.measure(one, ["u"])
    assert asked == [(["u"], 1, True)] and made.table(one).cost.kv_tokens == 2048


def test_the_instances_of_tetri_are_alike_in_all_roles(measuring):
    made, asked = measuring
    made.measure(Arrangement("tetri-mixed", "", ("mixed", "mixed")), ["u"])
    assert asked == [(["u"], 2, True)]
    found = made.table(Arrangement("tetri-auto", "", ("auto", "auto")))
    assert found.cost.decode_s(1, 0) == 0.02 and found.cost.prompt_s(512, 0, 512) == pytest.approx(0.416)


@pytest.fixture
def played_out(monkeypatch):
    """Nothing is started, and every run has a record at once. Returns the arrangements that would have been, with the
    roles of their workers."""
    started = []

    @contextmanager
    def serving(arrangement, config, folder, note):
        started.append((arrangement.name, [worker.role for worker in config.workers]))
        yield ["u"]

    monkeypatch.setattr(module, "serving", serving)
    monkeypatch.setattr(module, "_warm_up", lambda bench, urls: None)
    monkeypatch.setattr(module, "_undisturbed", lambda bench, run, urls: Record(run, 5.0))
    return started


KINDS = {
    "tetri-auto": Arrangement("tetri-auto", "", ("auto",) * 2),
    "tetri-mixed": Arrangement("tetri-mixed", "", ("mixed",) * 2),
    "vllm": Arrangement("vllm", "", servers=1),
}


def asked_for(*names):
    return Wanted([KINDS[name] for name in names], ["LPLD"], ["5"], [GIVEN], 1)


def test_after_its_runs_each_start_with_equal_instances_is_measured(measuring, played_out):
    made, asked = measuring
    compare(replace(made, arrangements=KINDS), asked_for("vllm", "tetri-auto", "tetri-mixed"), "")
    assert [name for name, _ in played_out] == ["vllm", "tetri-auto", "tetri-mixed"]
    assert [instances for _, instances, _ in asked] == [1, 2] and len(made.store.records) == 3
    assert {*made.store.tables} == {INSTANCE, SERVED, KINDS["vllm"].deployment}


def test_what_cannot_be_measured_costs_no_run(measuring, played_out, monkeypatch):
    def broken(urls, instances, model, draw):
        raise BenchError("u does not answer")

    made, _ = measuring
    monkeypatch.setattr(module, "seen", broken)
    made = replace(made, arrangements=KINDS, note=(notes := []).append)
    for name in ("vllm", "tetri-auto"):
        compare(made, asked_for(name), "")
    assert [record.error for record in made.store.records.values()] == ["", ""]
    assert [note for note in notes if "answer" in note] == [
        f"{name}: u does not answer" for name in ("vllm", "tetri-mixed")
    ]


@pytest.mark.parametrize(
    "names, measured",
    [
        (["tetri-auto"], ["tetri-mixed"]),
        (["tetri-auto", "tetri-mixed"], []),  # measured when its turn comes
        (["vllm"], []),
    ],
)
def test_without_a_coupled_arrangement_of_tetri_one_is_started_to_measure_it(measuring, played_out, names, measured):
    made, asked = measuring
    made = replace(made, arrangements=KINDS)
    for _ in range(2):  # the second time there is nothing to do
        compare(made, asked_for(*names), "")
    others = [(name, ["mixed" if name == "vllm" else name.removeprefix("tetri-")] * 2) for name in names]
    started = [*((name, ["mixed", "mixed"]) for name in measured), *others]
    assert [name for name, _ in played_out] == [name for name, _ in started]
    assert [each for each in played_out if each[0] != "vllm"] == [each for each in started if each[0] != "vllm"]
    assert SERVED in made.store.tables or names == ["vllm"]


def test_a_table_that_is_given_is_not_measured_again(bench, measuring):
    made, asked = measuring
    made.store.tables.clear()
    made = replace(made, config=load(CONF, SETTINGS), conf=CONF, settings=SETTINGS)
    mixed = Arrangement("tetri-mixed", "", ("mixed",) * 4)
    made.measure(mixed, ["u"])
    assert asked == [] and made.table(mixed) == Table(INSTANCE, build.table(made.config))


def test_emulated_deployments(tmp_path):
    """From the start of the processes to the record, with the machine's real threads."""
    from tetri.bench.compare.arrangements import arrangements
    from tetri.bench.deployment import own_folder

    with own_folder("bench") as folder, Awake() as awake:
        settings = (*SETTINGS, "emulated.time_scale=0.2")
        config = module.tetri_config(Arrangement("", ""), CONF, folder, settings)
        known = arrangements(config)
        store = Store(tmp_path / "runs.jsonl", {})
        store.read()
        made = Bench(
            CONF, settings, config, folder, known, {"LPLD": Workload("LPLD", 2048)}, 1000, 5, 0, LIMITS, store, awake,
            lambda text: None,
        )  # fmt: skip
        chosen = [known["tetri-2+2"], known["tetri-auto"]]
        compare(made, Wanted(chosen, ["LPLD"], ["5"], ["balanced"], 1), "tetri-auto")
    assert [len(record.served) for record in store.records.values()] == [5, 5]
    assert all(answer.jct_s > 0.002 * answer.output for record in store.records.values() for answer in record.answers)
