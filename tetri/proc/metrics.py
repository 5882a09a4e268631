"""The metrics of a deployment, in the form of Prometheus, made of one Observation. docs/metrics.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

import tetri
from tetri.request import DECODE_ROLES, Stage

Samples = Iterable[tuple[tuple[str, ...], Any]]  # values of labels, value
ANY = "any"  # every decode instance


@dataclass(frozen=True, slots=True)
class Found:
    """Where metrics come from. `observation`: the fields of a recent one; None: the broker does not answer. `http`:
    what a gateway has counted, None elsewhere."""

    observation: Mapping[str, Any] | None
    block_tokens: int
    http: Mapping[str, Any] | None = None

    @property
    def status(self) -> Mapping[str, Any]:
        """The state of the cluster."""
        assert self.observation is not None
        status: Mapping[str, Any] = self.observation["status"]
        return status

    @property
    def instances(self) -> list[Mapping[str, Any]]:
        """The instances that are not lost. Of a lost one the loads are old."""
        return [each for each in self.status["instances"] if each["state"] == "ready"]

    def count(self, name: str) -> Mapping[str, int]:
        """What the broker has counted under a name, by label."""
        assert self.observation is not None
        return self.observation["measures"]["counts"].get(name, {})  # type: ignore[no-any-return]

    @property
    def histograms(self) -> Mapping[str, Mapping[str, Any]]:
        """What the broker has measured, by name."""
        assert self.observation is not None
        return self.observation["measures"]["histograms"]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of docs/metrics.md, and where its samples are."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str
    samples: Callable[[Found], Samples]

    def family(self, found: Found) -> Family:
        """The metric with its samples."""
        if self.type == "counter":
            counter = CounterMetricFamily(self.name, self.help, labels=self.labels)
            for labels, value in self.samples(found):
                counter.add_metric(labels, value)
            return counter
        if self.type == "gauge":
            gauge = GaugeMetricFamily(self.name, self.help, labels=self.labels)
            for labels, value in self.samples(found):
                gauge.add_metric(labels, value)
            return gauge
        histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in self.samples(found):
            bounds = [*map(repr, map(float, value["bounds"])), "+Inf"]
            counts = accumulate(value["counts"])
            histogram.add_metric(labels, [*zip(bounds, counts, strict=True)], value["total"])
        return histogram


class DeploymentCollector(Collector):
    """All metrics, as `find` finds them at that moment."""

    def __init__(self, find: Callable[[], Found]) -> None:
        self._find = find

    def collect(self) -> Iterable[Family]:
        """Yield each metric with its samples."""
        found = self._find()
        yield BROKER_UP.family(found)
        if found.observation is not None:
            for metric in (*REQUESTS, *INSTANCES, *DEPLOYMENT, *FOR_ROUTERS):
                yield metric.family(found)
        if found.http is not None:
            for metric in GATEWAY:
                yield metric.family(found)


def free_blocks(load: Mapping[str, Any]) -> int:
    """Free KV blocks of an instance: none while it needs more than it has, until it preempts."""
    return max(int(load["free_blocks"]), 0)


def _counted(name: str) -> Callable[[Found], Samples]:
    return lambda found: (((label,), count) for label, count in found.count(name).items())


def _role_changes(found: Found) -> Samples:
    for label, count in found.count("role_changes").items():
        was, _, role = label.partition(">")
        yield (was, role), count


def _histogram(name: str) -> Callable[[Found], Samples]:
    return lambda found: [((), found.histograms[name])] if name in found.histograms else []


def _stages(found: Found) -> Samples:
    for name, histogram in found.histograms.items():
        prefix, _, stage = name.partition("_")
        if prefix == "stage":
            yield (stage,), histogram


def _open_by_stage(found: Found) -> Samples:
    """Also the stages without a choice: a series that comes and goes has gaps."""
    return (((stage,), found.status["requests"].get(stage, 0)) for stage in Stage if not stage.ended)


def _each(read: Callable[[Mapping[str, Any]], Any]) -> Callable[[Found], Samples]:
    """A value of each instance."""
    return lambda found: (((each["iid"],), read(each)) for each in found.status["instances"])


def _activity(name: str) -> Callable[[Found], Samples]:
    return _each(lambda instance: instance["activity"][name])


def _load(name: str) -> Callable[[Found], Samples]:
    return _of_load(lambda load: load[name])


def _of_load(read: Callable[[Mapping[str, Any]], Any]) -> Callable[[Found], Samples]:
    return lambda found: (((each["iid"],), read(each["load"])) for each in found.instances)


def _received(name: str) -> Callable[[Found], Samples]:
    return lambda found: (
        ((each["iid"], path), received[name])
        for each in found.status["instances"]
        for path, received in each["activity"]["received"].items()
    )


def _lengths(name: str) -> Callable[[Found], Samples]:
    return lambda found: (
        ((each["iid"],), each["predictor"][name]) for each in found.status["instances"] if each["predictor"] is not None
    )


def _up(found: Found) -> Samples:
    for each in found.status["instances"]:
        yield (each["iid"], each["role"]), int(each["state"] == "ready")


def _decodes(found: Found) -> Samples:
    for each in found.instances:
        for state in ("waiting", "running"):
            yield (each["iid"], state), each["load"][state]


def _step_ratios(found: Found) -> Samples:
    for each in found.instances:
        for phase, ratio in each["step_ratio"].items():
            if ratio is not None:
                yield (each["iid"], phase), ratio


def _breakers(found: Found) -> Samples:
    decodes = {each["iid"] for each in found.instances if each["role"] in DECODE_ROLES}
    for each in found.instances:
        for peer in each["unread_by"]:
            yield (each["iid"], peer), 1
        others = decodes - {each["iid"]}
        if others and others <= {*each["unread_by"]}:
            yield (each["iid"], ANY), 1


def _monitor_age(found: Found) -> Samples:
    if (monitor := found.status["monitor"]) is not None:
        yield (), monitor["age_s"]


def _open(*stages: str) -> Callable[[Found], Samples]:
    """Open choices in these stages."""
    return lambda found: [((found.status["model"],), sum(found.status["requests"].get(stage, 0) for stage in stages))]


def _decode_blocks(found: Found) -> tuple[int, int]:
    """KV blocks of the decode instances, and how many of them are free."""
    loads = [(each["blocks"], free_blocks(each["load"])) for each in found.instances if each["role"] in DECODE_ROLES]
    return sum(blocks for blocks, _ in loads), sum(free for _, free in loads)


def _kv_usage(found: Found) -> Samples:
    blocks, free = _decode_blocks(found)
    yield (found.status["model"],), 1 - free / blocks if blocks else 0.0


def _cache(found: Found) -> Samples:
    yield (str(found.block_tokens), str(_decode_blocks(found)[0])), 1


def _answers(found: Found) -> Samples:
    assert found.http is not None
    return [((status,), count) for status, count in found.http["answered"].items()]


def _answering(found: Found) -> Samples:
    assert found.http is not None
    return [((), found.http["open"])]


def _metrics(*lines: tuple[str, str, str, str, Callable[[Found], Samples]]) -> tuple[Metric, ...]:
    return tuple(Metric(name, type, tuple(labels.split()), help, read) for name, type, labels, help, read in lines)


_ENDED = "choices that ended: stop, length, cancelled, deadline, error"
_REFUSED = "Submits that were refused: invalid, too_long, too_many_choices, full, repeated_key"
_JUDGED = "choices by how they kept their limits of latency: met, ttft, tpot, both (missed), failed"
_RETRIED = "attempts that were started again: worker_lost, worker_restarted, not_held, kv_lost, kv_unread, given_up"

BROKER_UP = Metric(
    "tetri_broker_up",
    "gauge",
    (),
    "1 if the broker answers; if not, only this and the gateway's own are there",
    lambda found: [((), int(found.observation is not None))],
)
REQUESTS = _metrics(
    ("tetri_requests_ended_total", "counter", "reason", _ENDED, _counted("requests_ended")),
    ("tetri_requests_refused_total", "counter", "reason", _REFUSED, _counted("requests_refused")),
    ("tetri_slo_requests_total", "counter", "result", _JUDGED, _counted("slo_requests")),
    ("tetri_requests_open", "gauge", "stage", "open choices in each stage", _open_by_stage),
    ("tetri_retries_total", "counter", "reason", _RETRIED, _counted("retries")),
    ("tetri_role_changes_total", "counter", "was role", "changes of role that were carried out", _role_changes),
    (
        *("tetri_tokens_total", "counter", "kind"),
        "tokens of ended choices: prompt, output, local, adopted, recomputed, continued",
        _counted("tokens"),
    ),
    ("tetri_ttft_seconds", "histogram", "", "time to the first token, from arrival", _histogram("ttft")),
    (
        *("tetri_itl_seconds", "histogram", ""),
        "time between two output tokens, as they reach the broker",
        _histogram("itl"),
    ),
    (
        *("tetri_tpot_seconds", "histogram", ""),
        "of a choice: seconds per output token after the first",
        _histogram("tpot"),
    ),
    ("tetri_jct_seconds", "histogram", "", "from arrival to the end", _histogram("jct")),
    ("tetri_stage_seconds", "histogram", "stage", "of an ended choice, its time in each stage", _stages),
    (
        *("tetri_queue_predicted_seconds", "histogram", ""),
        "predicted when a request is assigned: prefill work before it",
        _histogram("queue_predicted"),
    ),
    ("tetri_prompt_tokens", "histogram", "", "of a choice", _histogram("prompt_tokens")),
    ("tetri_output_tokens", "histogram", "", "of a choice", _histogram("output_tokens")),
)
INSTANCES = _metrics(
    ("tetri_instance_up", "gauge", "iid role", "1 if it is ready, 0 if it is lost", _up),
    ("tetri_steps_total", "counter", "iid", "engine steps", _activity("steps")),
    ("tetri_step_seconds_total", "counter", "iid", "seconds in engine steps", _activity("step_s")),
    ("tetri_chunk_steps_total", "counter", "iid", "steps with a prefill chunk", _activity("chunk_steps")),
    ("tetri_chunk_tokens_total", "counter", "iid", "prompt tokens computed in chunks", _activity("chunk_tokens")),
    (
        *("tetri_chunk_space_tokens_total", "counter", "iid"),
        "prompt tokens for which these steps had space: the fill is the ratio",
        _activity("chunk_space"),
    ),
    ("tetri_decode_steps_total", "counter", "iid", "steps with a decode batch", _activity("decode_steps")),
    (
        *("tetri_decode_tokens_total", "counter", "iid", "output tokens of these: the mean batch is the ratio"),
        _activity("decode_tokens"),
    ),
    (
        *("tetri_recomputed_tokens_total", "counter", "iid"),
        "tokens of preempted requests that were computed again",
        _activity("recomputed"),
    ),
    ("tetri_preemptions_total", "counter", "iid", "preemptions of decode requests", _activity("preempted")),
    ("tetri_kv_blocks", "gauge", "iid", "KV blocks", _each(lambda instance: instance["blocks"])),
    ("tetri_kv_free_blocks", "gauge", "iid", "free KV blocks", _of_load(free_blocks)),
    ("tetri_queued_prompts", "gauge", "iid", "prompts in the prefill queue", _load("queued")),
    ("tetri_queued_seconds", "gauge", "iid", "predicted seconds of prefill work in the queue", _load("queued_s")),
    ("tetri_decode_requests", "gauge", "iid state", "waiting, running", _decodes),
    (
        *("tetri_heavy_decodes", "gauge", "iid"),
        "waiting and running requests that are predicted to be heavy",
        _load("heavy"),
    ),
    ("tetri_busy_share", "gauge", "iid", "share of time in which the engine computed", _load("busy")),
    ("tetri_step_ratio", "gauge", "iid phase", "measured over predicted step time", _step_ratios),
    ("tetri_kv_received_chunks_total", "counter", "iid path", "KV chunks fetched", _received("chunks")),
    ("tetri_kv_received_bytes_total", "counter", "iid path", "bytes of them", _received("bytes")),
    ("tetri_kv_received_seconds_total", "counter", "iid path", "seconds that they took", _received("seconds")),
    ("tetri_kv_failures_total", "counter", "iid path", "fetches that failed", _received("failed")),
    (
        *("tetri_lengths_scored_total", "counter", "iid"),
        "requests with a predicted length that have ended",
        _lengths("scored"),
    ),
    (
        *("tetri_lengths_right_total", "counter", "iid", "of these: the likeliest bucket was right"),
        _lengths("right"),
    ),
    (
        *("tetri_lengths_inside_total", "counter", "iid", "of these: shorter than the high end of the range"),
        _lengths("inside"),
    ),
    (
        *("tetri_breaker_open", "gauge", "iid peer"),
        f'1: KV of iid cannot be read by peer ("{ANY}": by no instance)',
        _breakers,
    ),
)
DEPLOYMENT = _metrics(
    (
        *("tetri_info", "gauge", "version model", "always 1"),
        lambda found: [((tetri.__version__, found.status["model"]), 1)],
    ),
    ("tetri_monitor_age_seconds", "gauge", "", "age of the newest cluster view", _monitor_age),
    (
        *("tetri_degraded", "gauge", "", "things that work worse than they should: tetri-cli status names them"),
        lambda found: [((), len(found.status["notes"]))],
    ),
)
GATEWAY = _metrics(
    ("tetri_http_answers_total", "counter", "status", "answers of this gateway", _answers),
    ("tetri_http_open", "gauge", "", "answers that it is giving", _answering),
)
FOR_ROUTERS = _metrics(
    (
        *("vllm:num_requests_waiting", "gauge", "model_name", "open choices that are not in a running batch"),
        _open("queued", "moving", "waiting"),
    ),
    (
        *("vllm:num_requests_running", "gauge", "model_name", "prompts being computed and running decodes"),
        _open("prefill", "decode"),
    ),
    (
        *("vllm:kv_cache_usage_perc", "gauge", "model_name"),
        "used share of the KV blocks of decode instances, 0 to 1",
        _kv_usage,
    ),
    ("vllm:cache_config_info", "gauge", "block_size num_gpu_blocks", "always 1", _cache),
)
