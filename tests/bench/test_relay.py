"""tools/bench_relay: what it makes of what arrived, its limits, and a small run of the real processes."""

import json
import os
import time

import pytest
from click.testing import CliRunner

from tetri.bench.relay import __main__ as relay
from tetri.bench.relay.readers import Stream, of_events
from tetri.bench.report import BenchError

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def event(text):
    return b'id: 1\ndata: {"choices":[{"index":0,"text":"%b","finish_reason":null}]}\n\n' % text


def test_a_token_came_with_the_piece_that_completes_its_text():
    first, second = event(b"a"), event(b"aa")
    pieces = [(1.0, HEAD), (2.0, first + second[:-20]), (3.0, second[-20:]), (4.0, event(b"") + b"data: [DONE]\n\n")]
    assert of_events(pieces) == Stream([2.0, 2.0, 2.0], 2)
    assert of_events([(1.0, HEAD), (2.0, first[:40]), (3.0, first[40:])]) == Stream([3.0], 1)


def test_latencies_of_complete_streams():
    whole = [Stream([1.5, 2.25], 2), Stream([2.0, 2.5], 1)]
    assert relay.measured(whole, [1.0, 2.0], 2, 0.5) == relay.Phase([0.5, 0.25, 1.0, 0.5], 0.5, 3)
    assert relay.measured(whole, [1.0, 2.0], 2, 0.5).per_cpu_s == 8.0
    for broken in ([*whole[:1], Stream([2.0], 1)], whole[:1]):
        with pytest.raises(BenchError, match="1 of 2 streams are complete"):
            relay.measured(broken, [1.0, 2.0], 2, 0.5)


class Played:
    """A run with 100 tokens a phase; `http_s`: their latency over HTTP."""

    def __init__(self, http_s, broker_s=0.001, gateway_s=0.01):
        self.http_s, self.broker_s, self.gateway_s = http_s, broker_s, gateway_s

    def phase(self, http, streams, steps, step_s):
        return relay.Phase([self.http_s if http else 0.001] * 100, self.gateway_s if http else self.broker_s, 100)


def test_the_figures_and_their_limits():
    found = relay.figures(Played(0.0025), True, 256, 5000, 1)
    few = {"streams": 16, "added_ms_p50": 1.5, "added_ms_p99": 1.5}
    assert found == {
        "streams": 256, "rate": 5000, "broker_tok_cpu_s": 100_000, "gateway_events_cpu_s": 10_000, "added_ms_p50": 1.5,
        "added_ms_p99": 1.5, "few": few, "tokens_an_event": 1.0, "ok": True,
    }  # fmt: skip
    assert relay.shown(found).splitlines()[-1] == "within the limits: yes"
    for bad in (Played(0.0035), Played(0.0025, broker_s=0.0026), Played(0.0025, gateway_s=0.013)):
        assert not relay.figures(bad, True, 256, 5000, 1)["ok"]
    assert "gateway_events_cpu_s" not in relay.figures(Played(0.0025), False, 256, 5000, 1)


def test_the_processor_time_of_a_process():
    begun, own = relay.cpu_s(os.getpid()), time.process_time()
    sum(range(100_000))
    assert relay.cpu_s(os.getpid()) - begun == pytest.approx(time.process_time() - own, abs=0.01)


def test_the_real_processes():
    result = CliRunner().invoke(relay.main, ["--json", "--streams", "8", "--rate", "400", "--seconds", "0.3"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["broker_tok_cpu_s"] > 0 and found["gateway_events_cpu_s"] > 0
    assert found["tokens_an_event"] >= 1.0  # a machine that stands still for a moment brings two in one event


def test_a_program_that_does_not_start_is_one_line(monkeypatch):
    monkeypatch.setitem(relay.PROGRAMS, "broker", "tetri.proc.nothing")
    result = CliRunner().invoke(relay.main, ["--broker-only"])
    assert result.exit_code == 1 and "broker did not start" in result.stderr and "No module named" in result.stderr
