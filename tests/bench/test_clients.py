"""tools/bench_clients: a small run of each of its halves, and its output."""

import json

import pytest
from click.testing import CliRunner

from tetri.bench import clients


@pytest.mark.parametrize("kind", clients.KINDS)
def test_a_delta_costs_each_client_something(kind):
    assert clients.delta_us(kind, 3, 2) > 0


def test_a_stopped_reader_is_probed_with_one_message_and_gets_all_in_the_end():
    """12,000 messages do not fit into the queues and buffers between the two."""
    found = clients.stopped_reader(400, 30, 0.03)
    assert list(found) == [*clients.PHASES]
    # A client on a busy machine may fall behind, too, but not for long.
    assert found["stopped"]["unsent"] > found["reads"]["unsent"] and found["stopped"]["tried"] == 1


def test_the_figures_and_their_limits(monkeypatch):
    monkeypatch.setattr(clients, "delta_us", lambda kind, streams, tokens: 12.345)
    gap, probe = {"median": 100.0, "p99": 110.0, "worst": 120.0}, {"median": 0.2, "p99": 0.3, "worst": 0.4}
    quiet = {"gap_ms": gap, "unsent": 0, "probes": 0}
    stopped = {**quiet, "unsent": 9, "probes": 2, "probe_ms": probe, "tried": 1, "probing_percent": 0.01}
    played = dict(zip(clients.PHASES, (quiet, stopped, quiet), strict=True))
    monkeypatch.setattr(clients, "stopped_reader", lambda *arguments: played)
    result = CliRunner().invoke(clients.main, ["--json"])
    found = json.loads(result.stdout)
    assert found["ok"] and found["broker"] == played and set(found["delta_us"].values()) == {12.35}
    for where, figure, value in ((gap, "worst", 301.0), (probe, "median", 1.1)):
        monkeypatch.setitem(where, figure, value)
        lines = CliRunner().invoke(clients.main, []).stdout.splitlines()
        assert lines[-1] == "within the limits: no"
    assert lines[1] == "a Delta in the client, blocking: 12.3 us"
    assert lines[7].split()[:4] == ["stopped", "100.0", "301.0", "9"]
