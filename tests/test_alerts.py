"""conf/alerts.yml and conf/prometheus.yml: alerts use documented metrics, say what to do, and fire when they should.

promtool, which comes with Prometheus, evaluates the rules.
"""

import json
import shutil
import subprocess
from typing import NamedTuple

import documented
import pytest
import yaml

CONF = documented.ROOT / "conf"
RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load((CONF / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}
EVALUATED = "30m"
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not on the PATH: it comes with Prometheus"
)


class Case(NamedTuple):
    """An alert fires, with this summary and these labels, where series go as in `fires`, and not as in one of `quiet`.
    A series is `name{labels}`; it gets the labels of a scrape. Values as promtool reads them, 15 s apart."""

    fires: dict[str, str]
    summary: str
    labels: dict[str, str]
    quiet: list[dict[str, str]]


CASES = {
    "TetriNotScraped": Case({"up": "0x120"}, "The gateway h:8000 does not answer", {}, [{"up": "1x120"}]),
    "TetriBrokerDown": Case(
        {"tetri_broker_up": "0x120"},
        "The broker does not answer the gateway h:8000",
        {},
        [{"tetri_broker_up": "1x120"}],
    ),
    "TetriNothingServed": Case(
        {'tetri_requests_open{stage="queued"}': "2x120", 'tetri_chunk_tokens_total{iid="p0"}': "90x120"},
        "2 requests are open and nothing is computed",
        {},
        [
            {'tetri_requests_open{stage="decode"}': "2x120", 'tetri_decode_tokens_total{iid="d0"}': "0+9x120"},
            {'tetri_requests_open{stage="prefill"}': "2x120", 'tetri_chunk_tokens_total{iid="p0"}': "0+9x120"},
            {'tetri_requests_open{stage="decode"}': "0x120"},
        ],
    ),
    "TetriInstanceLost": Case(
        {'tetri_instance_up{iid="d0",role="decode"}': "0x120"},
        "The decode instance d0 is lost",
        {"iid": "d0", "role": "decode"},
        [{'tetri_instance_up{iid="d0",role="decode"}': "1x117 0x3"}],
    ),
    "TetriRequestsFail": Case(
        {
            'tetri_requests_ended_total{reason="stop"}': "0+9x120",
            'tetri_requests_ended_total{reason="error"}': "0+1x120",
        },
        "10% of the requests end with an error",
        {},
        [{'tetri_requests_ended_total{reason="cancelled"}': "0+9x120"}, {}],
    ),
    "TetriRequestsRefused": Case(
        {'tetri_requests_refused_total{reason="full"}': "0+15x120"},
        "1 requests/s are refused: the deployment is full",
        {},
        [{'tetri_requests_refused_total{reason="invalid"}': "0+15x120"}],
    ),
    "TetriFirstTokenLate": Case(
        {
            'tetri_ttft_seconds_bucket{le="5"}': "0x120",
            'tetri_ttft_seconds_bucket{le="10"}': "0+1x120",
            'tetri_ttft_seconds_bucket{le="+Inf"}': "0+1x120",
        },
        "The 99th percentile of the time to first token is 9.95s",
        {},
        [{'tetri_ttft_seconds_bucket{le="2"}': "0+1x120", 'tetri_ttft_seconds_bucket{le="+Inf"}': "0+1x120"}],
    ),
    "TetriLimitsMissed": Case(
        {'tetri_slo_requests_total{result="met"}': "0+4x120", 'tetri_slo_requests_total{result="ttft"}': "0+1x120"},
        "Only 80% of the requests keep their limits of latency",
        {},
        [{'tetri_slo_requests_total{result="met"}': "0+19x120", 'tetri_slo_requests_total{result="tpot"}': "0+1x120"}],
    ),
    "TetriQueueGrows": Case(
        {'tetri_queued_seconds{iid="p0"}': "0+1x120", 'tetri_queued_seconds{iid="p1"}': "0x120"},
        "2m 0s of prefill work are queued, and it grows",
        {},
        [{'tetri_queued_seconds{iid="p0"}': "99x120"}, {'tetri_queued_seconds{iid="p0"}': "0+0.01x120"}],
    ),
    "TetriRetries": Case(
        {'tetri_retries_total{reason="worker_lost"}': "0+1x120"},
        "40 attempts in 10 minutes were started again: worker_lost",
        {"reason": "worker_lost"},
        [{'tetri_retries_total{reason="worker_lost"}': "99x120"}],
    ),
    "TetriKVUnread": Case(
        {'tetri_breaker_open{iid="p0",peer="d1"}': "1x120"},
        "KV of p0 cannot be read by d1",
        {"iid": "p0", "peer": "d1"},
        [{'tetri_breaker_open{iid="p0",peer="d1"}': "0x120"}],
    ),
    "TetriRecomputes": Case(
        {'tetri_recomputed_tokens_total{iid="d0"}': "0+1x120", 'tetri_chunk_tokens_total{iid="p0"}': "0+10x120"},
        "10% as many tokens are computed again as prompt tokens are computed",
        {},
        [{'tetri_recomputed_tokens_total{iid="d0"}': "0+1x120", 'tetri_chunk_tokens_total{iid="p0"}': "0+99x120"}],
    ),
    "TetriMonitorSilent": Case(
        {"tetri_monitor_age_seconds": "20x120"},
        "The newest cluster view is 20s old",
        {},
        [{"tetri_monitor_age_seconds": "2x120"}],
    ),
    "TetriStepsUnlikePredicted": Case(
        {'tetri_step_ratio{iid="p0",phase="prefill"}': "2x120"},
        "Steps of p0 (prefill) take 2 times the predicted time",
        {"iid": "p0", "phase": "prefill"},
        [{'tetri_step_ratio{iid="p0",phase="prefill"}': "1.2x120"}],
    ),
    "TetriDegraded": Case(
        {"tetri_degraded": "2x120"}, "2 things work worse than they should", {}, [{"tetri_degraded": "0x120"}]
    ),
}  # fmt: skip


def scraped(values):
    """Series as promtool wants them, with the labels that a scrape adds."""
    added = 'job="tetri",instance="h:8000"'
    for name, line in values.items():
        series = name.replace("{", f"{{{added},") if "{" in name else f"{name}{{{added}}}"
        yield {"series": series, "values": line}


def evaluations(alert, case):
    """A test for promtool of each situation."""
    rule, labels = RULES[alert], {"job": "tetri", "instance": "h:8000", **case.labels}
    fired = {
        "exp_labels": {**labels, **rule["labels"]},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    for values, alerts in [(case.fires, [fired]), *((values, []) for values in case.quiet)]:
        expected = {"eval_time": EVALUATED, "alertname": alert, "exp_alerts": alerts}
        yield {"interval": "15s", "input_series": [*scraped(values)], "alert_rule_test": [expected]}


def written(folder, tests):
    """A file for `promtool test rules`."""
    path = folder / "tests.yml"
    tried = {"rule_files": [str(CONF / "alerts.yml")], "evaluation_interval": "15s", "tests": [*tests]}
    path.write_text(json.dumps(tried), encoding="utf-8")
    return path


def promtool(*arguments):
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried():
    assert list(CASES) == list(RULES)


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_uses_documented_metrics_and_says_what_to_do(alert):
    assert list(documented.problems(RULES[alert]["expr"], documented.series())) == []
    assert RULES[alert]["annotations"].keys() == {"summary", "description", "action", "runbook"}
    assert RULES[alert]["labels"]["severity"] in ("critical", "warning", "info")


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path):
    promtool("check", "rules", CONF / "alerts.yml")
    tests = [test for alert, case in CASES.items() for test in evaluations(alert, case)]
    promtool("test", "rules", written(tmp_path, tests))


@needs_promtool
def test_an_alert_that_does_not_fire_is_noticed(tmp_path):
    wrong = CASES["TetriDegraded"]._replace(fires={"tetri_degraded": "0x120"})
    with pytest.raises(AssertionError, match="TetriDegraded"):
        promtool("test", "rules", written(tmp_path, evaluations("TetriDegraded", wrong)))


@needs_promtool
def test_prometheus_takes_the_configuration(tmp_path):
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(CONF / name, tmp_path)
    (tmp_path / "tetri-api-key").write_text("secret", encoding="utf-8")  # the reader's
    promtool("check", "config", tmp_path / "prometheus.yml")
