"""check_sizing: check tetri-cli size against the simulator.

The deployment that it names must keep the limits with the live schedulers, and one instance fewer of either role must
not. The simulated requests are other ones than those of the sizing, and five times as many where a limit is near.

Exit status 1 when that holds for fewer than 9 of 10 cases.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import process_time
from typing import Any

import click

from tetri import cost
from tetri.bench.report import Program, as_json, give, progress, table
from tetri.sim.pools import Demand, Goal, sampled
from tetri.sim.setup import Setup
from tetri.sim.sizing import SERVED, checked, size
from tetri.sim.traces import TokenCounts

LEAST = 0.9  # share of the cases
LINK_BYTES_S = 25e9


@dataclass(frozen=True)
class Case:
    """A load, its limits and the hardware."""

    table: str
    rate: float
    prompt: str
    output: str
    ttft_s: float
    tpot_s: float
    share: float = 0.9
    max_batch: int = 256
    link_bytes_s: float = LINK_BYTES_S


CASES = (
    Case("v100-opt13b", 5, "1000", "200", 2.0, 0.1),
    Case("v100-opt13b", 5, "1000", "200", 2.0, 0.06),
    Case("v100-opt13b", 10, "1000", "200", 1.0, 0.08),
    Case("v100-opt13b", 8, "lognormal:500:0.8", "20-400", 3.0, 0.06),
    Case("v100-opt13b", 40, "300", "50", 0.3, 0.045),
    Case("v100-opt13b", 3, "2000", "100", 4.0, 0.05),
    Case("v100-opt13b", 15, "100-900", "64", 0.8, 0.04),
    Case("v100-opt13b", 2, "500", "500", 0.6, 0.15),
    Case("v100-opt13b", 5, "1000", "200", 2.0, 0.1, link_bytes_s=2e9),
    Case("v100-opt13b", 6, "200-1200", "10-300", 2.5, 0.07, share=0.99),
    Case("cpu-smollm2", 4, "500", "100", 1.0, 0.06, max_batch=32),
    Case("cpu-smollm2", 2, "1000", "200", 2.0, 0.1, max_batch=32),
    Case("cpu-smollm2", 10, "300", "30-300", 1.5, 0.055, max_batch=32),
    Case("cpu-smollm2", 6, "lognormal:400:0.7", "lognormal:80:0.6", 2.0, 0.065, max_batch=32),
)


@click.command(cls=Program)
@click.option("--case", "chosen", type=click.IntRange(1, len(CASES)), multiple=True, help="Only this; may be repeated.")
@click.option("--requests", type=click.IntRange(50), default=SERVED, show_default=True, help="In each simulation.")
@click.option("--seed", type=click.IntRange(1), default=1, show_default=True, help="Of the simulated requests.")
@as_json
def main(chosen: Sequence[int], requests: int, seed: int, as_json: bool) -> None:
    """Size each case, simulate it and one instance fewer of each role, and compare. Takes minutes."""
    made = []
    for number in sorted({*chosen}) or range(1, len(CASES) + 1):
        made.append(measured(CASES[number - 1], requests, seed))
        progress(f"case {number}: {shown(made[-1])[-1]}")
    right = sum(each["ok"] for each in made)
    ok = right >= LEAST * len(made)
    found = {"cases": made, "right": right, "limit": LEAST, "ok": ok}
    head = (
        "table",
        "rate",
        "prompt",
        "output",
        "share",
        "TTFT",
        "TPOT",
        "sized",
        *("as sized", "-1 prefill", "-1 decode"),
    )
    text = table((*head, "CPU s", ""), map(shown, made))
    give(found, f"{text}\n\n{right} of {len(made)} are right; TTFT/TPOT in s, ~: near a limit", as_json)
    if not ok:
        sys.exit(1)


def measured(case: Case, requests: int, seed: int) -> dict[str, Any]:
    """Size and simulate a case."""
    setup = Setup(cost.load(case.table), max_batch=case.max_batch, link_bytes_s=case.link_bytes_s)
    goal = Goal(case.rate, case.ttft_s, case.tpot_s, case.share)
    prompt, output = TokenCounts.parsed(case.prompt), TokenCounts.parsed(case.output)
    started = process_time()
    sizing = size(Demand(goal, setup, sampled(prompt, output, 0), 0))
    spent = process_time() - started
    checks = checked(Demand(goal, setup, sampled(prompt, output, seed), seed), sizing, requests)
    return {
        **asdict(case),
        "simulated": [asdict(each) for each in checks],
        "ok": all(each.reached == each.expected for each in checks),
        "run": {"cpu_s": spent},
    }


def shown(made: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    first, *fewer = made["simulated"]
    found = {(first["prefill"] - each["prefill"], first["decode"] - each["decode"]): each for each in fewer}
    times = [
        "-" if each is None else f"{each['ttft_s']:.3g}/{each['tpot_s']:.3g}{'' if each['sure'] else '~'}"
        for each in (first, found.get((1, 0)), found.get((0, 1)))
    ]
    load = (made["table"], f"{made['rate']:g}", made["prompt"], made["output"], f"{made['share']:g}")
    limits = (f"{made['ttft_s']:g}", f"{made['tpot_s']:g}", f"{first['prefill']}+{first['decode']}")
    return (*load, *limits, *times, f"{made['run']['cpu_s']:.1f}", "right" if made["ok"] else "wrong")


if __name__ == "__main__":
    main(prog_name="check_sizing")
