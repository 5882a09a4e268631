"""The metrics: every line of docs/metrics.md is exposed as it says, and each moves when what it measures does."""

from pathlib import Path

import pytest
from fake_broker import STATUS, instance
from msgspec import to_builtins
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families as parse

from tetri import __version__
from tetri.proc.metrics import (
    BROKER_UP,
    DEPLOYMENT,
    FOR_ROUTERS,
    GATEWAY,
    INSTANCES,
    REQUESTS,
    DeploymentCollector,
    Found,
)
from tetri.request import PredictorStatus
from tetri.wire.observation import Transferred

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
EXPOSED = [*REQUESTS, *INSTANCES, BROKER_UP, *DEPLOYMENT, *GATEWAY, *FOR_ROUTERS]


def documented():
    """(name, type, labels, what) of each line."""
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            name, kind, labels, what = [cell.strip() for cell in line[1:-1].split("|")]
            yield (
                name.strip("`"),
                kind,
                tuple(labels.replace("`", "").split(", ")) if labels else (),
                what.replace("`", ""),
            )


def test_the_docs_have_every_metric_as_it_is_exposed():
    assert sorted(documented()) == sorted((each.name, each.type, each.labels, each.help) for each in EXPOSED)


def observation():
    empty = {"bounds": [0.5, 2.0], "counts": [0, 0, 0], "total": 0.0}
    predictor = to_builtins(PredictorStatus(kind="prior", on=False))
    prefill, decode = instance("p0", "prefill", predictor=predictor), instance("d0", "decode")
    decode["activity"]["received"] = {"shm": to_builtins(Transferred())}
    names = ("ttft", "itl", "tpot", "jct", "stage_decode", "queue_predicted", "prompt_tokens", "output_tokens")
    counts = {name: {} for name in ("requests_ended", "requests_refused", "retries", "role_changes", "tokens")}
    counts["slo_requests"] = {}
    status = {**STATUS, "instances": [prefill, decode], "requests": {}, "monitor": {"number": 1, "age_s": 0.0}}
    return {"status": status, "measures": {"counts": counts, "histograms": dict.fromkeys(names, empty)}}


def exposed(found, http=None):
    """The value of each sample."""
    text = generate_latest(DeploymentCollector(lambda: Found(found, 16, http))).decode()
    families = [*parse(text)]
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def put(found, path, value):
    *way, last = path.split("/")
    for key in way:
        found = found[int(key) if key.isdigit() else key]
    found[int(last) if last.isdigit() else last] = value


P, D = "status/instances/0", "status/instances/1"
# metric, what changes, to what -> labels, value (of a histogram: how many values are at most 2)
MOVES = [
    ("tetri_requests_ended_total", "measures/counts/requests_ended/stop", 3, {"reason": "stop"}, 3),
    ("tetri_requests_refused_total", "measures/counts/requests_refused/full", 2, {"reason": "full"}, 2),
    ("tetri_slo_requests_total", "measures/counts/slo_requests/ttft", 2, {"result": "ttft"}, 2),
    ("tetri_requests_open", "status/requests/queued", 4, {"stage": "queued"}, 4),
    ("tetri_retries_total", "measures/counts/retries/kv_lost", 1, {"reason": "kv_lost"}, 1),
    (
        *("tetri_role_changes_total", "measures/counts/role_changes/prefill>decode", 1),
        *({"was": "prefill", "role": "decode"}, 1),
    ),
    ("tetri_tokens_total", "measures/counts/tokens/adopted", 9, {"kind": "adopted"}, 9),
    *((f"tetri_{name}_seconds", f"measures/histograms/{name}", None, {}, 3) for name in ("ttft", "itl", "tpot", "jct")),
    ("tetri_stage_seconds", "measures/histograms/stage_decode", None, {"stage": "decode"}, 3),
    ("tetri_queue_predicted_seconds", "measures/histograms/queue_predicted", None, {}, 3),
    ("tetri_prompt_tokens", "measures/histograms/prompt_tokens", None, {}, 3),
    ("tetri_output_tokens", "measures/histograms/output_tokens", None, {}, 3),
    ("tetri_instance_up", f"{P}/state", "lost", {"iid": "p0", "role": "prefill"}, 0),
    *(
        (f"tetri_{name}_total", f"{D}/activity/{field}", 7, {"iid": "d0"}, 7)
        for name, field in (
            *(("steps", "steps"), ("step_seconds", "step_s"), ("chunk_steps", "chunk_steps")),
            *(("chunk_tokens", "chunk_tokens"), ("chunk_space_tokens", "chunk_space")),
            *(("decode_steps", "decode_steps"), ("decode_tokens", "decode_tokens")),
            *(("recomputed_tokens", "recomputed"), ("preemptions", "preempted")),
        )
    ),
    ("tetri_kv_blocks", f"{D}/blocks", 99, {"iid": "d0"}, 99),
    *(
        (f"tetri_{name}", f"{P}/load/{field}", 5, {"iid": "p0"}, 5)
        for name, field in (
            *(("kv_free_blocks", "free_blocks"), ("queued_prompts", "queued"), ("queued_seconds", "queued_s")),
            *(("heavy_decodes", "heavy"), ("busy_share", "busy")),
        )
    ),
    ("tetri_decode_requests", f"{D}/load/waiting", 6, {"iid": "d0", "state": "waiting"}, 6),
    ("tetri_decode_requests", f"{D}/load/running", 6, {"iid": "d0", "state": "running"}, 6),
    ("tetri_step_ratio", f"{D}/step_ratio/decode", 1.5, {"iid": "d0", "phase": "decode"}, 1.5),
    *(
        (f"tetri_kv_{name}_total", f"{D}/activity/received/shm/{field}", 8, {"iid": "d0", "path": "shm"}, 8)
        for name, field in (
            *(("received_chunks", "chunks"), ("received_bytes", "bytes")),
            *(("received_seconds", "seconds"), ("failures", "failed")),
        )
    ),
    *(
        (f"tetri_lengths_{field}_total", f"{P}/predictor/{field}", 2, {"iid": "p0"}, 2)
        for field in ("scored", "right", "inside")
    ),
    ("tetri_breaker_open", f"{P}/unread_by/d0", "why", {"iid": "p0", "peer": "d0"}, 1),
    ("tetri_breaker_open", f"{P}/unread_by/d0", "why", {"iid": "p0", "peer": "any"}, 1),
    ("tetri_info", "status/model", "other", {"version": __version__, "model": "other"}, 1),
    ("tetri_monitor_age_seconds", "status/monitor/age_s", 3.5, {}, 3.5),
    ("tetri_degraded", "status/notes", ["a", "b"], {}, 2),
    *(
        (f"vllm:num_requests_{kind}", f"status/requests/{stage}", 3, {"model_name": "m"}, 3)
        for kind, stages in (("waiting", ("queued", "moving", "waiting")), ("running", ("prefill", "decode")))
        for stage in stages
    ),
    ("vllm:kv_cache_usage_perc", f"{D}/load/free_blocks", 0, {"model_name": "m"}, 1),
    ("vllm:cache_config_info", f"{D}/blocks", 32, {"block_size": "16", "num_gpu_blocks": "32"}, 1),
]


@pytest.mark.parametrize(("name", "path", "to", "labels", "value"), MOVES, ids=[f"{m[0]} {m[1]}" for m in MOVES])
def test_a_metric_moves_when_what_it_measures_does(name, path, to, labels, value):
    found = observation()
    kind = next(each.type for each in EXPOSED if each.name == name)
    sample = (f"{name}_bucket" if kind == "histogram" else name), {**labels, **({"le": "2.0"} if to is None else {})}
    key = sample[0], tuple(sorted(sample[1].items()))
    before = exposed(found)
    put(found, path, {"bounds": [0.5, 2.0], "counts": [1, 2, 3], "total": 40.0} if to is None else to)
    after = exposed(found)
    assert after[key] == value and before.get(key) != value
    if to is None:
        whole = tuple(sorted(labels.items()))
        assert (after[f"{name}_count", whole], after[f"{name}_sum", whole]) == (6, 40)


def test_every_metric_of_the_broker_has_such_a_test():
    others = {each.name for each in (BROKER_UP, *GATEWAY)}
    assert {move[0] for move in MOVES} == {each.name for each in EXPOSED} - others


def test_a_gateway_adds_its_own_and_has_them_without_a_broker():
    http = {"open": 2, "answered": {"200": 5}}
    alone = exposed(None, http)
    assert alone == {
        ("tetri_broker_up", ()): 0,
        ("tetri_http_answers_total", (("status", "200"),)): 5,
        ("tetri_http_open", ()): 2,
    }
    assert exposed(observation(), http).items() >= {**alone, ("tetri_broker_up", ()): 1}.items()
    assert not [name for name, _ in exposed(observation()) if "http" in name]


def test_what_is_not_known_has_no_sample():
    found = observation()
    found["status"]["monitor"] = None
    names = {name for name, _ in exposed(found)}
    assert not names & {"tetri_monitor_age_seconds", "tetri_step_ratio", "tetri_breaker_open"}
    assert (
        exposed({**found, "status": {**found["status"], "instances": []}})[
            "vllm:kv_cache_usage_perc", (("model_name", "m"),)
        ]
        == 0
    )


def test_an_instance_that_needs_more_memory_than_it_has_has_none_free():
    found = observation()
    put(found, f"{D}/load/free_blocks", -2)
    shown = exposed(found)
    assert shown["tetri_kv_free_blocks", (("iid", "d0"),)] == 0
    assert shown["vllm:kv_cache_usage_perc", (("model_name", "m"),)] == 1


def test_the_loads_of_a_lost_instance_are_left_out_and_it_counts_as_no_reader():
    seen = observation()
    unread, lost = {"unread_by": {"d0": "why"}}, {"state": "lost"}
    instances = [instance("p0", "prefill") | unread, instance("d0", "decode"), instance("d1", "decode") | lost]
    seen["status"]["instances"] = instances
    found = exposed(seen)
    of_lost = {name for name, labels in found if ("iid", "d1") in labels}
    assert {"tetri_instance_up", "tetri_steps_total", "tetri_kv_blocks"} <= of_lost
    loads = {"tetri_kv_free_blocks", "tetri_queued_seconds", "tetri_busy_share", "tetri_decode_requests"}
    assert not loads & of_lost and loads <= {name for name, _ in found}
    assert found["tetri_breaker_open", (("iid", "p0"), ("peer", "any"))] == 1


def test_a_stage_without_a_choice_has_zero():
    seen = observation()
    seen["status"]["requests"] = {"decode": 2}
    found = exposed(seen)
    assert [found["tetri_requests_open", (("stage", stage),)] for stage in ("queued", "decode")] == [0, 2]
    assert ("tetri_requests_open", (("stage", "done"),)) not in found


def test_openmetrics_reads_them_too():
    text = exposition.generate_latest(DeploymentCollector(lambda: Found(observation(), 16))).decode()
    assert {family.name for family in parser.text_string_to_metric_families(text)} >= {
        "tetri_steps",
        "tetri_ttft_seconds",
    }
