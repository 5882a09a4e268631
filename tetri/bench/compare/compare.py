"""Run a comparison: start the arrangements in turn, ask each the same, keep what came of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from random import Random
from statistics import fmean
from subprocess import PIPE

from tetri import cost
from tetri.bench.compare.arrangements import Arrangement
from tetri.bench.compare.awake import Awake
from tetri.bench.compare.load import Answer, Load, Question, capacity, headers_of, question
from tetri.bench.compare.plan import Run, Wanted, seconds_left, started_together
from tetri.bench.compare.served_cost import mean, of_instance, of_server, seen
from tetri.bench.compare.servers import model_name, serving, tetri_config
from tetri.bench.compare.store import Capacity, Record, Store, Table
from tetri.bench.compare.traffic import FIRST_ID, Workload
from tetri.bench.deployment import EXPECTED
from tetri.bench.report import BenchError, Progress
from tetri.config import Config, WorkerConfig
from tetri.cost import Cost
from tetri.metrics import percentile, summarise
from tetri.proc import build
from tetri.request import Slo
from tetri.sim.setup import UNBOUNDED
from tetri.sim.sweep.cases import REGIMES

IN_FLIGHT = 64  # requests, while the capacity is measured
INSTANCE, SERVED = "tetri", "tetri, served"  # whose table it is: of an engine alone, of instances that serve
PROFILE = (sys.executable, "-P", "-c", "from tetri.cli import main; main()", "profile", "--quick")
GIVEN = "given"  # the name of limits that were given
WARM_UP, WARM_PROMPT, WARM_OUTPUT = 8, 256, 8  # requests that each server is asked first, and their tokens
SEEDS = 1000  # repeats of a seed
DRAIN_S = 30.0  # from the last request to the last answer, if nothing is known
TRIES = 3  # of a run in which the machine stood still
DISTURBED = (*EXPECTED, BenchError, OSError)  # what ends the runs of one start, and not the comparison


@dataclass(frozen=True, slots=True)
class Bench:
    """What a comparison works with. `config`: the configuration with its own roles; `settings`: what overrides the file
    `conf`; `vocabulary`: of the model; `given`: limits that replace the regimes."""

    conf: Path
    settings: tuple[str, ...]
    config: Config
    folder: Path
    arrangements: Mapping[str, Arrangement]
    workloads: Mapping[str, Workload]
    vocabulary: int
    requests: int
    seed: int
    given: Slo
    store: Store
    awake: Awake
    note: Progress

    def configured(self, arrangement: Arrangement) -> Config:
        """The configuration with the arrangement's roles. Raises ConfigError."""
        if not arrangement.is_tetri:
            return self.config
        return tetri_config(arrangement, self.conf, self.folder, self.settings)

    def table(self, arrangement: Arrangement) -> Table | None:
        """What steps take in it while it serves, the mean of what was measured; None if that is not known."""
        if arrangement.is_tetri and self._table_given:
            return Table(INSTANCE, self.instance_cost())
        found = self.store.tables.get(_table_of(arrangement))
        if not found:
            return None
        costs, delays = [each.cost for each in found], [each.delay_s for each in found]
        return Table(found[0].deployment, mean(costs), fmean(delays))

    def instance_cost(self) -> Cost:
        """The cost table of an engine of tetri alone, measured if it is not known: of it the limits are multiples.
        Raises BenchError."""
        if INSTANCE not in self.store.tables:
            self.store.add(Table(INSTANCE, self._measured()))
        return self.store.tables[INSTANCE][0].cost

    @property
    def _table_given(self) -> bool:
        return self.config.engine.kind == "emulated" or bool(self.config.engine.table)

    def _measured(self) -> Cost:
        if self._table_given:
            return build.table(self.config) or Cost()
        # At the same time, as they will serve: instances on one socket share its memory and caches.
        workers = self.config.workers if self.config.workers[0].gpu < 0 else self.config.workers[:1]
        self.note("measuring the cost table of an instance, beside the others")
        with tempfile.TemporaryDirectory() as folder:
            tables = [Path(folder) / f"{worker.iid}.toml" for worker in workers]
            commands = map(self._profile, workers, tables)
            processes = [subprocess.Popen(each, stdout=PIPE, stderr=PIPE, text=True) for each in commands]
            ended = [(process.communicate()[1], process.returncode) for process in processes]
            if problem := next((errors for errors, status in ended if status), ""):
                raise BenchError(f"no cost table: {problem.strip().splitlines()[-1]}")
            return cost.load(tables[0])

    def _profile(self, worker: WorkerConfig, table: Path) -> list[str]:
        settings = [part for setting in self.settings for part in ("--set", setting)]
        return [*PROFILE, "--conf", str(self.conf), *settings, "--cpus", worker.cpus, "--out", str(table)]

    def measure(self, arrangement: Arrangement, urls: Sequence[str]) -> None:
        """Measure what steps take in these servers, of an arrangement whose instances are all alike. Raises
        BenchError."""
        if arrangement.is_tetri and self._table_given:
            return
        self.note(f"measuring the steps of {arrangement.name}")
        own, rng = self.instance_cost(), Random(arrangement.deployment)

        def draw(tokens: int) -> list[int]:
            return rng.choices(range(FIRST_ID, self.vocabulary), k=tokens)

        workers = len(self.config.workers)
        found = seen(urls, arrangement.servers or workers, model_name(self.config), draw)
        if arrangement.is_tetri:
            self.store.add(Table(_table_of(arrangement), *of_instance(found, own, self.config.engine.chunk_tokens)))
            return
        memory_bytes = workers // arrangement.servers * self.config.engine.kv_mib << 20
        memory = memory_bytes // own.kv_token_bytes if own.kv_token_bytes else UNBOUNDED  # a user's table may lack it
        self.store.add(Table(_table_of(arrangement), of_server(found, own.kv_token_bytes, memory)))

    def slo(self, workload: str, regime: str) -> Slo:
        """The limits of a regime: multiples of what the p90 prompt and a decode step take alone on one instance."""
        if regime == GIVEN:
            return self.given
        table, (ttft, tpot) = self.instance_cost(), REGIMES[regime]
        prompt = self.workloads[workload].p90_prompt
        prefill_s = table.prompt_s(prompt, 0, self.config.engine.chunk_tokens)
        return Slo(ttft_s=ttft * prefill_s, tpot_s=tpot * table.decode_s(1, prompt))


def _table_of(arrangement: Arrangement) -> str:
    """Whose table it has: that of tetri's instances is the same in all roles."""
    return SERVED if arrangement.is_tetri else arrangement.deployment


def compare(bench: Bench, wanted: Wanted, capacity_of: str) -> None:
    """Run all that is wanted and not in the store. Raises BenchError, TraceError."""
    for name in wanted.workloads:
        bench.workloads[name].draw(bench.requests, 0)  # what a trace cannot give is said at once
    if advice := bench.awake.advice():
        bench.note(advice)
    if not all(each.urls for each in wanted.arrangements):
        bench.instance_cost()  # measured before anything else runs
    with_share = any(rate.endswith("%") for rate in wanted.rates)
    missing = [name for name in wanted.workloads if name not in bench.store.capacities] if with_share else []
    if missing:
        _measure_capacities(bench, bench.arrangements[capacity_of], missing)
    left = [run for run in wanted.runs() if run not in bench.store.records]
    _measure_instances(bench, {run.arrangement for run in left})
    groups = started_together(left, bench.arrangements)
    starts_s: list[float] = []
    for number, group in enumerate(groups):
        left_s = seconds_left(groups[number:], lambda run: _expected_s(bench, run), starts_s)
        bench.note(f"start {number + 1} of {len(groups)}, {ceil(left_s / 60)} min left: {group[0].arrangement}")
        if (start_s := _run_group(bench, group)) is not None:
            starts_s.append(start_s)


def _measure_instances(bench: Bench, names: Set[str]) -> None:
    """Measure what steps take in instances of tetri, unless one of these arrangements shows it in its turn."""
    tetri = [each for each in bench.arrangements.values() if each.is_tetri]
    coupled = next((each for each in tetri if each.coupled), None)
    if coupled is None or coupled.name in names or names.isdisjoint(each.name for each in tetri):
        return
    if bench.table(coupled) is None:
        try:
            with serving(coupled, bench.configured(coupled), bench.folder, bench.note) as urls:
                _warm_up(bench, urls)
                bench.measure(coupled, urls)
        except DISTURBED as error:  # only predictions need it
            bench.note(f"{coupled.name}: {error}")


def _expected_s(bench: Bench, run: Run) -> float:
    """The seconds that a run will take: as many as others with its requests; without any, a guess."""
    known = [r.seconds for r in bench.store.records.values() if r.seconds and r.run.same_requests(run)]
    return fmean(known) if known else DRAIN_S + bench.requests / rate_of(bench, run.workload, run.rate)


def rate_of(bench: Bench, workload: str, rate: str) -> float:
    """The requests per second that a rate means."""
    if rate.endswith("%"):
        return float(rate.removesuffix("%")) / 100 * bench.store.capacities[workload]
    return float(rate)


def _measure_capacities(bench: Bench, arrangement: Arrangement, workloads: Sequence[str]) -> None:
    bench.note(f"measuring the capacity of {arrangement.name}, {IN_FLIGHT} requests in flight")
    with serving(arrangement, bench.configured(arrangement), bench.folder, bench.note) as urls:
        _warm_up(bench, urls)
        for name in workloads:
            drawn = bench.workloads[name].draw(3 * IN_FLIGHT, 0)
            questions = [_question(bench, each.ids("capacity", bench.vocabulary), each.output) for each in drawn]
            answers = Load(urls, arrangement.routing).in_flight(questions, IN_FLIGHT)
            found = capacity(answers, IN_FLIGHT)
            if not found:
                raise BenchError(f"{arrangement.name} has no capacity for {name}: {_first_error(answers)}")
            bench.store.add(Capacity(name, found))
            bench.note(f"capacity for {name}: {found:.3g} requests/s")


def _run_group(bench: Bench, group: Sequence[Run]) -> float | None:
    """Run what the same processes serve; return the seconds that their start took. An error is the record of all runs
    that are left, and None if the start failed."""
    arrangement, begun = bench.arrangements[group[0].arrangement], time.monotonic()
    left, start_s = [*group], None
    try:
        with serving(arrangement, bench.configured(arrangement), bench.folder, bench.note) as urls:
            _warm_up(bench, urls)
            start_s = time.monotonic() - begun
            while left:
                record = _undisturbed(bench, left[0], urls)
                bench.store.add(record)
                bench.note(_line(record))
                left.pop(0)
            if arrangement.coupled:  # after the runs: it would change what adaptive workers have learned
                bench.measure(arrangement, urls)
                start_s = time.monotonic() - begun - sum(bench.store.records[run].seconds for run in group)
    except DISTURBED as error:
        bench.note(f"{arrangement.name}: {error}")
        for run in left:
            bench.store.add(Record(run, rate_of(bench, run.workload, run.rate), error=str(error)))
    return start_s


def _warm_up(bench: Bench, urls: Sequence[str]) -> None:
    """Let each server answer some requests before one counts. Raises BenchError."""
    for number, url in enumerate(urls):
        ids = [[(i * (j + 2) + number) % 97 + 1 for i in range(WARM_PROMPT + j)] for j in range(WARM_UP)]
        answers = Load([url], "").in_flight([_question(bench, each, WARM_OUTPUT) for each in ids], WARM_UP)
        if error := _first_error(answers):
            raise BenchError(f"{url} does not answer: {error}")


def _undisturbed(bench: Bench, run: Run, urls: Sequence[str]) -> Record:
    """The record of a run. One in which the machine stood still says nothing about what was measured: it runs again."""
    for attempt in range(1, TRIES + 1):
        record = _run(bench, run, urls, attempt)
        if not record.standstill_s or attempt == TRIES:
            break
        bench.note(f"the machine stood still for {record.standstill_s:.1f} s: again {run}")
    return record


def _run(bench: Bench, run: Run, urls: Sequence[str], attempt: int) -> Record:
    arrangement, rate = bench.arrangements[run.arrangement], rate_of(bench, run.workload, run.rate)
    # A prompt that this server had before may be in its prefix cache: every run has tokens of its own.
    salt = f"{run} {attempt}"
    drawn = bench.workloads[run.workload].draw(bench.requests, SEEDS * bench.seed + run.repeat)
    questions = [_question(bench, each.ids(salt, bench.vocabulary), each.output, each.at / rate) for each in drawn]
    limits = bench.slo(run.workload, run.regime) if run.regime else Slo()
    load = Load(urls, arrangement.routing, headers_of(limits))
    bench.awake.standstills()
    begun = time.monotonic()
    answers = load.at_times(questions)
    seconds = time.monotonic() - begun
    gaps = load.gaps_s or [0.0]
    return Record(
        run, rate, answers, seconds, load.cpu_s / seconds,
        (percentile(gaps, 0.5), percentile(gaps, 0.99), max(gaps)), max(bench.awake.standstills(), default=0.0),
    )  # fmt: skip


def _question(bench: Bench, ids: list[int], output: int, at_s: float = 0.0) -> Question:
    return question(at_s, model_name(bench.config), ids, output)


def _first_error(answers: Sequence[Answer]) -> str:
    return next((each.error for each in answers if each.error), "")


def _line(record: Record) -> str:
    """A line of progress."""
    failed = len(record.answers) - len(record.served)
    if not record.served:
        return f"{record.run}: {_first_error(record.answers)}"
    ttft, jct, tpot = (
        summarise(values) for values in zip(*((a.ttft_s, a.jct_s, a.tpot_s) for a in record.served), strict=True)
    )
    more = f", {failed} failed: {_first_error(record.answers)}" if failed else ""
    return (
        f"{record.run}: TTFT {ttft.mean:.2f} s, JCT {jct.mean:.2f} s, p99 of TPOT {1000 * tpot.p99:.0f} ms,"
        f" client {record.client_cpu:.0%} of a CPU{more}"
    )
