"""Report a comparison: as plain values for JSON, as tables, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from tetri.bench.compare import evidence
from tetri.bench.compare.arrangements import LEAST, Arrangement
from tetri.bench.compare.compare import Bench, rate_of
from tetri.bench.compare.evidence import (
    ATTAINED,
    JCT,
    METRICS,
    TPOT,
    TPOT_P99,
    TTFT,
    Cell,
    Metric,
    Values,
    compared,
    value,
)
from tetri.bench.compare.load import Answer
from tetri.bench.compare.plan import ANY, Run, Wanted
from tetri.bench.compare.predict import predicted
from tetri.bench.compare.store import Record
from tetri.bench.report import table
from tetri.request import Slo

LIMITS = {TTFT.name: 0.10, JCT.name: 0.10, TPOT_P99.name: 0.25}  # the largest error of a prediction
Found = dict[str, Any]


def findings(bench: Bench, wanted: Wanted) -> Found:
    """Everything that the runs say, and the simulator beside them."""
    cells = [Cell(*each) for each in _product(wanted.workloads, wanted.rates, wanted.regimes)]
    found = [_cell(bench, wanted, cell) for cell in cells]
    return {
        "requests": bench.requests,
        "repeats": wanted.repeats,
        "arrangements": {each.name: each.summary for each in wanted.arrangements},
        "capacity": bench.store.capacities,
        "advice": bench.awake.advice(),
        "cells": found,
        "goodput": _goodputs(wanted, found),
        "predictions": _accuracy(found),
        "verdicts": [*_verdicts(wanted.arrangements, found)],
    }


def _product(*parts: Sequence[str]) -> list[tuple[str, ...]]:
    made: list[tuple[str, ...]] = [()]
    for part in parts:
        made = [(*each, value) for each in made for value in part]
    return made


# ---------------------------------------------------------------- one cell


def _cell(bench: Bench, wanted: Wanted, cell: Cell) -> Found:
    slo = bench.slo(cell.workload, cell.regime)
    ran = {each.name: _records(bench.store.records, each, cell, wanted.repeats) for each in wanted.arrangements}
    whole = {
        name: {metric: evidence.values(metric, [record.answers for record in records], slo) for metric in METRICS}
        for name, records in ran.items()
        if len(records) == wanted.repeats and not any(record.error for record in records)
    }
    return {
        **cell._asdict(),
        "rate_s": rate_of(bench, cell.workload, cell.rate),
        "ttft_s": slo.ttft_s,
        "tpot_s": slo.tpot_s,
        "arrangements": {each.name: _row(bench, each, ran[each.name], slo) for each in wanted.arrangements},
        "against": {
            name: {other: _against(ours, theirs) for other, theirs in whole.items() if other != name}
            for name, ours in whole.items()
        },
    }


def _against(ours: Mapping[Metric, Values], theirs: Mapping[Metric, Values]) -> Found:
    return {metric.name: compared(metric, ours[metric], theirs[metric])._asdict() for metric in METRICS}


def _row(bench: Bench, arrangement: Arrangement, records: Sequence[Record], slo: Slo) -> Found:
    errors = sorted({record.error for record in records if record.error})
    records = [record for record in records if not record.error]
    if not records:
        return {"error": "; ".join(errors) or "it has not run"}
    answers = [record.answers for record in records]
    guessed, why_not = _guessed(bench, arrangement, records, slo)
    failed = [each.error for repeat in answers for each in repeat if each.error]
    return {
        "measured": _values(answers, slo),
        "predicted": _values(guessed, slo),
        "not_predicted": why_not,
        "repeats": [_values([repeat], slo) for repeat in answers],
        "failed": len(failed),
        "error": "; ".join([*errors, *sorted(set(failed))[:3]]),
        "client_cpu": fmean(record.client_cpu for record in records),
        "gap_p99_s": median(record.gaps_s[1] for record in records),
        "gap_longest_s": max(record.gaps_s[2] for record in records),
        "standstill_s": max(record.standstill_s for record in records),
    }


def _records(records: Mapping[Run, Record], arrangement: Arrangement, cell: Cell, repeats: int) -> list[Record]:
    regime = cell.regime if arrangement.knows_limits else ANY
    runs = (Run(arrangement.name, cell.workload, cell.rate, regime, number) for number in range(1, repeats + 1))
    return [records[run] for run in runs if run in records]


def _guessed(
    bench: Bench, arrangement: Arrangement, records: Sequence[Record], slo: Slo
) -> tuple[list[list[Answer]], str]:
    """The answers of each repeat as the simulator times them; else why there are none."""
    config = bench.configured(arrangement)
    try:
        if (table := bench.table(arrangement)) is None:
            return [], ""
        return [predicted(arrangement, config, table, each.served, slo) for each in records if each.served], ""
    except ValueError as error:  # SimError, or what no simulated server can hold
        return [], str(error)


def _values(repeats: Sequence[Sequence[Answer]], slo: Slo) -> dict[str, float | None]:
    if not repeats:
        return dict.fromkeys((metric.name for metric in METRICS), None)
    return {metric.name: value(metric, evidence.values(metric, repeats, slo)) for metric in METRICS}


def times(bench: Bench, wanted: Wanted) -> list[tuple[str, dict[str, dict[str, list[float]]]]]:
    """For each workload, at its highest rate and in the first regime, a title, and the times of all requests by metric
    and arrangement."""
    made = []
    for workload in wanted.workloads:
        rate = max(wanted.rates, key=lambda rate: rate_of(bench, workload, rate))
        cell = Cell(workload, rate, wanted.regimes[0])
        served = {
            each.name: [answer for record in records for answer in record.served]
            for each in wanted.arrangements
            if (records := _records(bench.store.records, each, cell, wanted.repeats))
        }
        metrics = {
            metric.name.split()[0]: {name: [metric.of(a, Slo()) for a in answers] for name, answers in served.items()}
            for metric in (TTFT, TPOT, JCT)
        }
        made.append((f"{cell.workload} at {cell.rate}", metrics))
    return made


# ---------------------------------------------------------------- over all cells


def _goodputs(wanted: Wanted, cells: Sequence[Found]) -> list[Found]:
    """The highest rate at which 90 % of the requests keep their limits, where several rates were measured."""
    if len(wanted.rates) < 2:
        return []
    made = []
    for workload, regime in _product(wanted.workloads, wanted.regimes):
        there = [each for each in cells if (each["workload"], each["regime"]) == (workload, regime)]
        rates = {}
        for name in (each.name for each in wanted.arrangements):
            rows = [(cell["rate_s"], cell["arrangements"][name]) for cell in there]
            rates[name] = evidence.goodput(
                [(rate, row["measured"][ATTAINED.name]) for rate, row in rows if "measured" in row]
            )
        made.append({"workload": workload, "regime": regime, "rate_s": rates})
    return made


def _accuracy(cells: Sequence[Found]) -> Found:
    """How far the simulator is off, over all arrangements and cells: relative errors."""
    made = {}
    for name, limit in LIMITS.items():
        errors = {
            f"{row_name}, {cell['workload']} at {cell['rate']}, {cell['regime']}": (
                row["predicted"][name] / row["measured"][name] - 1
            )
            for cell in cells
            for row_name, row in cell["arrangements"].items()
            if row.get("predicted", {}).get(name) and row["measured"][name]
        }
        worst = max(errors, key=lambda each: abs(errors[each]), default=None)
        made[name] = {
            "limit": limit,
            "within": sum(abs(error) <= limit for error in errors.values()),
            "of": len(errors),
            "median": median(errors.values()) if errors else None,
            "worst": None if worst is None else {"where": worst, "off": errors[worst]},
        }
    return made


def _verdicts(arrangements: Sequence[Arrangement], cells: Sequence[Found]) -> Iterator[str]:
    named = {each.name: each for each in arrangements}
    if "tetri-auto" in named:
        for metric in (ATTAINED, TTFT, JCT, TPOT_P99):
            best = [cell for cell in cells if _is_best(metric, "tetri-auto", cell)]
            yield _sentence(f"tetri-auto is best or equal in {metric.name}", best, [c for c in cells if c not in best])
    splits = [each for each in arrangements if each.is_tetri and "prefill" in each.roles]
    coupled = [each for each in arrangements if each.coupled]
    if splits and coupled:
        helps = [cell for cell in cells if _helps(splits, coupled, cell)]
        others = [cell for cell in cells if cell not in helps]
        yield _sentence("phases kept apart all the time attain more than any coupled arrangement", helps, others)


def _is_best(metric: Metric, name: str, cell: Found) -> bool:
    """Whether no other arrangement is certainly better."""
    others = cell["against"].get(name, {}).values()
    return bool(others) and not any(_surely_better(metric, each[metric.name], than=True) for each in others)


def _surely_better(metric: Metric, estimate: Mapping[str, float | None], than: bool = False) -> bool:
    """Whether the interval has only values that say that the first is better; with `than` that the second is."""
    low, high, even = estimate["low"], estimate["high"], 0.0 if metric.higher else 1.0
    if low is None or high is None:
        return False
    return low > even if metric.higher is not than else high < even


def _helps(splits: Sequence[Arrangement], coupled: Sequence[Arrangement], cell: Found) -> bool:
    return any(
        all(
            _surely_better(ATTAINED, cell["against"][split.name][other.name][ATTAINED.name])
            for other in coupled
            if other.name in cell["against"][split.name]
        )
        for split in splits
        if split.name in cell["against"]
    )


def _sentence(statement: str, right: Sequence[Found], wrong: Sequence[Found]) -> str:
    def names(cells: Sequence[Found]) -> str:
        return ", ".join(f"{cell['workload']} {cell['rate']} {cell['regime']}" for cell in cells)

    if not right:
        return f"{statement}: nowhere"
    return f"{statement} in {len(right)} of {len(right) + len(wrong)}: {names(right)}" + (
        f"; not in {names(wrong)}" if wrong else ""
    )


# ---------------------------------------------------------------- as text


def shown(found: Found) -> str:
    """The report as text."""
    lines: list[str] = []
    for cell in found["cells"]:
        lines += [*_shown_cell(cell), ""]
    for each in found["goodput"]:
        rates = ", ".join(
            f"{name} {'outside the measured rates' if rate is None else f'{rate:.3g}/s'}"
            for name, rate in each["rate_s"].items()
        )
        lines += [f"90 % attained, {each['workload']}, {each['regime']}: {rates}", ""]
    for name, each in found["predictions"].items():
        if each["of"]:
            worst = each["worst"]
            lines.append(
                f"predicted {name}: {each['within']} of {each['of']} within {each['limit']:.0%}, median"
                f" {each['median']:+.1%}, worst {worst['off']:+.0%} ({worst['where']})"
            )
    if found["advice"]:
        lines.append(found["advice"])
    return "\n".join([*lines, "", *found["verdicts"]])


def _shown_cell(cell: Found) -> Iterator[str]:
    limits = "no limits"
    if cell["ttft_s"] is not None:
        limits = f"{cell['regime']}: TTFT <= {cell['ttft_s']:.3g} s, TPOT <= {1000 * cell['tpot_s']:.3g} ms"
    yield f"{cell['workload']} at {cell['rate_s']:.3g} requests/s ({cell['rate']}), {limits}; in brackets: simulated"
    head = ["", *(metric.name for metric in METRICS), "gap p99", "client CPU", "failed"]
    rows = [_shown_row(name, row) for name, row in cell["arrangements"].items()]
    yield table(head, [row for row in rows if len(row) > 2])
    yield from (f"{name}: {error}" for name, error in (row for row in rows if len(row) == 2))
    for name, row in cell["arrangements"].items():
        if row.get("not_predicted"):
            yield f"{name}: not simulated: {row['not_predicted']}"
        if row.get("standstill_s"):
            yield f"{name}: in some repeat the machine stood still, for up to {row['standstill_s']:.1f} s"
    yield from _shown_rivals(cell)


def _shown_row(name: str, row: Found) -> list[str]:
    if "measured" not in row:
        return [name, str(row["error"])]
    cells = [
        f"{_number(metric, row['measured'][metric.name])} ({_number(metric, row['predicted'][metric.name])})"
        for metric in METRICS
    ]
    return [name, *cells, f"{row['gap_p99_s']:.3f}", f"{row['client_cpu']:.0%}", str(row["failed"])]


def _number(metric: Metric, number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.1%}" if metric.higher else f"{number:.3f}" if number < 10 else f"{number:.1f}"


def _shown_rivals(cell: Found) -> Iterator[str]:
    """tetri's arrangements against the better of the rivals, for each metric."""
    rivals = [name for name in cell["against"] if name.startswith("vllm-") and name.endswith(f"-{LEAST}")]
    ours = [name for name in cell["against"] if name.startswith("tetri-")]
    if not rivals or not ours:
        return
    rows = []
    for name in ours:
        row = [name]
        for metric in METRICS:
            best = better(metric, rivals, cell)
            each = cell["against"][name][best][metric.name]
            row.append(_ratio(metric, each))
        rows.append(row)
    yield f"against the better of {' and '.join(rivals)} (ratio, of attained the difference; 95 % interval):"
    yield table(["", *(metric.name for metric in METRICS)], rows)


def better(metric: Metric, names: Sequence[str], cell: Found) -> str:
    """The arrangement that is better in this metric."""
    sign = -1 if metric.higher else 1
    return min(names, key=lambda name: sign * (cell["arrangements"][name]["measured"][metric.name] or 0.0))


def _ratio(metric: Metric, each: Mapping[str, float | None]) -> str:
    if each["value"] is None or each["low"] is None or each["high"] is None:
        return "-"
    if metric.higher:
        return f"{100 * each['value']:+.1f} ({100 * each['low']:+.1f} to {100 * each['high']:+.1f})"
    return f"{each['value']:.2f} ({each['low']:.2f} to {each['high']:.2f})"
