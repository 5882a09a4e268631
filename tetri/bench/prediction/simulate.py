"""Simulate one policy, predictor and draw of requests with the live cores, and compare all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from tetri import cost
from tetri.bench.prediction.tables import KINDS, Row
from tetri.bench.report import interval
from tetri.metrics import percentile
from tetri.policy.rules import Rules
from tetri.predict.card import read_card
from tetri.request import Expected, LengthDistribution, PredictorStatus
from tetri.sim.setup import Setup, SimError
from tetri.sim.texts import RecordedText, read
from tetri.sim.traces import resampled
from tetri.sim.world import World

COST = "v100-opt13b"
TRAINED = ("prior", "classifier", "hidden", "both")
PAID = ("classifier", "both", "noisy")
ADMISSIONS = ("greedy", "reserve_static", "reserve_dynamic", "peak")
DISPATCHERS = ("power_of_two", "power_of_two_ratio", "random", "round_robin", "least_loaded", "imbalance")
SHARES = {"mean": None, "p50": 0.50, "p95": 0.95, "p99": 0.99}
COUNTS = ("predicted", "late", "scored", "right", "prior_right", "inside")
CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """A comparison of the `policies` of the policy table `sweep`; other settings are tetri's defaults. `kv_tokens`: of
    each instance. `load`: request rate as a multiple of `full_rate` of the decode instances; 0: all arrive at once."""

    name: str
    sweep: str
    policies: tuple[str, ...]
    requests: int
    kv_tokens: int
    prefill: int
    decode: int
    load: float = 0.0


#: KV tokens: half of the cost table's 39,000, and enough for all requests to write 1,024 tokens at once.
TIGHT, ROOMY = 20_000, 160_000
SETTINGS = (
    Setting("admission, at once", "admit", ADMISSIONS, 128, TIGHT, 2, 1),
    Setting("admission, Poisson", "admit", ADMISSIONS, 240, TIGHT, 2, 1, load=1.15),
    Setting("admission, at once, room for all", "admit", ("greedy", "peak"), 128, ROOMY, 2, 1),
    Setting("dispatch, at once", "decode_route", DISPATCHERS, 256, TIGHT, 4, 4),
    Setting("dispatch, Poisson", "decode_route", DISPATCHERS, 400, TIGHT, 4, 4, load=1.15),
)


@dataclass(frozen=True, slots=True)
class Source:
    """The input files and the settings that all runs share."""

    predictions: Path
    predictor: Path
    cover: float = 0.0
    reserve_share: float = 0.5

    def texts(self) -> list[RecordedText]:
        """Return the recorded texts. Raises RecordedTextError."""
        return _texts(self.predictions)

    def expected(self, kind: str) -> Expected:
        """Return what a live worker with a predictor of this kind knows before any traffic. Raises PredictError."""
        card = read_card(self.predictor, "classifier" if kind == "classifier" else "hidden")
        return Expected(kind, LengthDistribution(card.width, card.prior), () if kind == "prior" else card.levels)


@cache
def _texts(path: Path) -> list[RecordedText]:
    return read(path)


def full_rate(texts: Sequence[RecordedText], table: cost.Cost, kv_tokens: int) -> float:
    """Return the requests per second that one decode instance with full KV serves. A request holds prompt + output / 2
    KV tokens on average, for as many steps as it has output tokens."""
    steps = sum(text.output for text in texts)
    held = sum(text.output * (text.prompt + text.output / 2) for text in texts) / steps
    batch = kv_tokens / held
    return batch / table.decode_s(round(batch), kv_tokens) / (steps / len(texts))


PrefillRequest = tuple[Source, Setting, str, str, int]


def run(request: PrefillRequest) -> dict[str, float]:
    """Simulate one policy, predictor and seed. Raises SimError."""
    source, setting, policy, kind, seed = request
    table, texts = cost.load(COST), source.texts()
    trained = kind in TRAINED
    rules: Any = Rules(length="trained" if trained else kind, length_cover=source.cover)
    setup = Setup(
        cost=table if kind in PAID else replace(table, predictor_s=0.0, predictor_token_s=0.0),
        prefill=setting.prefill,
        decode=setting.decode,
        rules=replace(rules, **{setting.sweep: policy}),
        expected=source.expected(kind) if trained else None,
        kv_tokens=setting.kv_tokens,
        context=CONTEXT,
        reserve_share=source.reserve_share,
        seed=seed,
    )
    rate = setting.load * setting.decode * full_rate(texts, table, setting.kv_tokens)
    world = World(setup, resampled(setting.requests, texts, seed, rate))
    result = world.run()
    done = result.done()
    if len(done) != setting.requests:
        raise SimError(f"only {len(done)} of {setting.requests} requests were served")
    made = {"preempted": fmean(each.preempted > 0 for each in done), "makespan_s": result.end_s}
    for metric in ("jct", "ttft", "tpot"):
        times = [seconds for each in done if (seconds := getattr(each, f"{metric}_s")) is not None]
        for name, share in SHARES.items():
            made[f"{metric}_{name}"] = fmean(times) if share is None else percentile(times, share)
    return made | _counted(world)


def _counted(world: World) -> dict[str, float]:
    """Return the predictor statistics of the prefill workers, as in `status`."""
    prefillers = [w.core for w in world.workers.values() if w.core.own.instance.role == "prefill"]
    learnt = [core.estimator for core in prefillers if core.estimator]
    statuses: list[PredictorStatus] = [each.status() for each in learnt]
    if not statuses:
        return {}
    return {
        "on": fmean(each.on for each in statuses),
        **{n: float(sum(getattr(each, n) for each in statuses)) for n in COUNTS},
    }


# ---------------------------------------------------------------- many runs


Mapped = Callable[[Callable[[PrefillRequest], dict[str, float]], Iterable[PrefillRequest]], Iterable[dict[str, float]]]


def compared(
    source: Source, setting: Setting, seeds: int, mapped: Mapped, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Compare all policies and the predictors `kinds`, of which the first is none, with the same requests."""
    keys = [(policy, kind) for policy in setting.policies for kind in kinds]
    prefill_requests = [(source, setting, policy, kind, seed) for policy, kind in keys for seed in range(seeds)]
    runs = list(mapped(run, prefill_requests))
    by_key = {key: runs[at * seeds : (at + 1) * seeds] for at, key in enumerate(keys)}
    plain = by_key[setting.policies[0], "none"]
    rows = [_row(policy, kind, by_key[policy, kind], by_key[policy, "none"], plain) for policy, kind in keys]
    rate = setting.load * setting.decode * full_rate(source.texts(), cost.load(COST), setting.kv_tokens)
    return {**asdict(setting), "rate": rate, "seeds": seeds, "kinds": list(kinds), "rows": rows}


Runs = Sequence[dict[str, float]]  # one result for each seed


def _row(policy: str, kind: str, mine: Runs, none: Runs, plain: Runs) -> Row:
    """Return one row. `none`: the same policy without prediction; `plain`: tetri's default policy without
    prediction."""
    means = {name: fmean(each[name] for each in mine) for name in mine[0]}
    return {
        "policy": policy,
        "length": kind,
        **means,
        "against_none": {} if kind == "none" else _against(mine, none),
        "against_plain": {} if mine is plain else _against(mine, plain),
    }


def _against(mine: Runs, other: Runs) -> dict[str, Any]:
    timed = [name for name in other[0] if name not in ("preempted", "makespan_s", *COUNTS)]
    pairs = {name: [(a[name], b[name]) for a, b in zip(mine, other, strict=True)] for name in timed}
    return {
        name: {
            "seconds": interval([a - b for a, b in both]),
            "share": interval([a / b - 1 for a, b in both]),
        }
        for name, both in pairs.items()
    }
