"""tetri-cli status: the workers, the monitor, and how well lengths are predicted."""

import json
import re

import pytest
from fake_broker import STATUS, instance

INSTANCE = instance("p0", "prefill")


def test_status(run, broker):
    broker(lambda message: [{**STATUS, "instances": [INSTANCE]}])
    status, out, _ = run("status", "--json")
    assert status == 0 and json.loads(out)["instances"] == [INSTANCE]
    _, out, _ = run("status")
    assert "requests  decode 1" in out and "counted   none" in out
    header, row = (re.split(r"\s{2,}", line) for line in out.splitlines()[-2:])
    assert dict(zip(header, row, strict=False)) == {
        **{"instance": "p0", "role": "prefill", "state": "ready", "queued": "1", "queue time": "0.0 ms", "fill": "-"},
        **{"waiting": "0", "running": "2", "heavy": "0", "batch": "-", "blocks": "9", "KV used": "11%"},
        **{"busy": "0%", "held": "3"},
    }


def test_the_help_explains_the_columns(run):
    for command in ("status", "top"):
        assert "queue time  how long it will take to compute them" in run(command, "--help")[1]
    assert "held        requests" in run("status", "--help")[1] and "held  " not in run("top", "--help")[1]


def test_status_shows_how_limits_are_kept_and_which_are_missed(run, broker):
    found = {"slo": {"ttft_s": 0.5, "tpot_s": 0.05}, "slo_requests": {"met": 6, "ttft": 1, "tpot": 0, "failed": 1}}
    broker(lambda message: [{**STATUS, **found}])
    line = "limits    TTFT 500.0 ms   TPOT 50.0 ms   kept by 6 of 8 (75%); missed: ttft 1, failed 1"
    assert line in run("status")[1].splitlines()
    told = json.loads(run("status", "--json")[1])
    assert {name: told[name] for name in found} == found
    broker(lambda message: [STATUS])
    assert "limits    TTFT -   TPOT -   kept by 0 of 0 (-)" in run("status")[1].splitlines()


def test_a_lost_instance_is_not_said_to_be_busy(run, broker):
    instance = {**INSTANCE, "state": "lost", "load": {**INSTANCE["load"], "busy": 0.99}}
    broker(lambda message: [{**STATUS, "instances": [instance]}])
    header, row = (re.split(r"\s{2,}", line) for line in run("status")[1].splitlines()[-2:])
    assert row[header.index("busy")] == "-"


def test_status_shows_what_the_gateways_count(run, broker, place):
    broker(lambda message: [STATUS])
    assert "gateway" not in run("status")[1] and json.loads(run("status", "--json")[1])["gateways"] == {}
    report = {"url": "http://127.0.0.1:8000", "open": 2, "answered": {"200": 7, "429": 1}, "ignored": {"user": 3}}
    (place / "gateway.json").write_text(json.dumps(report))
    line = "gateway   http://127.0.0.1:8000/v1: 2 open, 7 answered 200, 1 answered 429; ignored user 3"
    assert line in run("status")[1].splitlines()
    assert json.loads(run("status", "--json")[1])["gateways"] == {"gateway": report}


def test_status_shows_kv_paths_and_what_happened_to_kv_where_anything_did(run, broker):
    quiet = {**INSTANCE, "paths": {"shm": 2, "stream": 1}, "counters": {"late": 0, "flipped": 0}}
    noted = {**quiet, "iid": "d0", "counters": {"late": 3, "flipped": 0, "healed": 12}}
    broker(lambda message: [{**STATUS, "instances": [quiet, noted]}])
    out = run("status")[1].splitlines()
    assert out[-4].endswith("  shm 2, stream 1")
    assert [re.split(r"\s{2,}", line) for line in out[-2:]] == [
        ["counted by", "events"],
        ["d0", "late 3, healed 12"],
    ]
    assert json.loads(run("status", "--json")[1])["instances"] == [quiet, noted]
    broker(lambda message: [{**STATUS, "instances": [quiet]}])
    assert "counted by" not in run("status")[1]


def test_status_shows_measured_over_predicted_step_times(run, broker):
    ratios = {"p0": {"prefill": 3.875, "decode": None}, "m0": {"prefill": 1.0, "decode": 0.25}}
    shown = [{**INSTANCE, "iid": iid, "step_ratio": ratio} for iid, ratio in ratios.items()]
    broker(lambda message: [{**STATUS, "instances": shown}])
    rows = [re.split(r"\s{2,}", line) for line in run("status")[1].splitlines()[-3:]]
    assert [row[14] for row in rows] == ["step ratio", "prefill 3.88", "prefill 1.00, decode 0.25"]
    assert json.loads(run("status", "--json")[1])["instances"] == shown


def test_status_ends_with_what_works_worse_than_it_should(run, broker):
    broker(lambda message: [{**STATUS, "instances": [INSTANCE], "notes": ["no cost table", "d0 is lost: silent"]}])
    assert run("status")[1].splitlines()[-2:] == ["degraded  no cost table", "degraded  d0 is lost: silent"]


def test_status_says_how_well_lengths_are_predicted(run, broker):
    none = {"kind": "prior", "on": False, "note": "no predictor: tetri brings none", "predicted": 0, "late": 0}
    none |= {"scored": 0, "right": 0, "prior_right": 0, "inside": 0, "buckets": {}, "cut": 0, "unread": 0}
    works = {**none, "kind": "hidden", "on": True, "note": "", "predicted": 120, "late": 3}
    works |= {"scored": 50, "right": 23, "prior_right": 20, "inside": 40}
    worse = {**works, "on": False, "note": "off: worse than the prior", "cut": 7, "unread": 2}
    found = {"p0": none, "p1": works, "m0": worse, "d0": works, "d1": none, "d2": None}
    roles = {"p": "prefill", "m": "mixed", "d": "decode"}
    shown = [{**INSTANCE, "iid": iid, "role": roles[iid[0]], "predictor": each} for iid, each in found.items()]
    broker(lambda message: [{**STATUS, "instances": shown}])
    rows = [re.split(r"\s{2,}", line) for line in run("status")[1].splitlines()[-5:]]
    shares = ["50", "46%", "40%", "80%"]
    assert rows == [
        ["lengths by", "kind", "state", "predicted", "late", "ended", "right", "of the prior", "below end", "note"],
        ["p0", "prior", "-", "0", "0", "0", "-", "-", "-", none["note"]],
        ["p1", "hidden", "on", "120", "3", *shares],
        ["m0", "hidden", "off", "120", "3", *shares, "off: worse than the prior; 7 prompts cut; 2 prompts unread"],
        ["d0", "hidden", "on", "120", "3", *shares],
    ]
    assert json.loads(run("status", "--json")[1])["instances"] == shown


@pytest.mark.parametrize(
    ("monitor", "line"),
    [
        ({"number": 1234, "age_s": 0.07, "flip": "balance"}, "view 1234, 0.1 s old, flip policy balance"),
        ({"number": 7, "age_s": 9.0, "flip": "none"}, "silent for 9.0 s: requests are placed without load reports"),
        (None, "silent since the broker's start: requests are placed without load reports"),
    ],
)
def test_status_says_whether_the_monitor_is_heard(run, broker, monitor, line):
    broker(lambda message: [{**STATUS, "monitor": monitor}])
    assert f"monitor   {line}" in run("status")[1]
    assert json.loads(run("status", "--json")[1])["monitor"] == monitor
