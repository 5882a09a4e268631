"""Other policies and settings than the defaults, live: the same tokens, and nothing left."""

from __future__ import annotations

import tempfile

import pytest
from live import LiveCluster
from traffic import Pressure

ALONE = "worker=[{iid='m0', role='mixed'}]"
PAIR = "worker=[{iid='p0', role='prefill'}, {iid='m0', role='mixed'}]"


@pytest.mark.parametrize(
    "overrides",
    [
        [ALONE, "policy.order=ageing", "policy.admit=peak", "policy.length=noisy", "engine.stream_interval=8"],
        [PAIR, "policy.order=deadline", "policy.admit=reserve_static", "policy.length=oracle", "monitor.load_ms=20"],
        [PAIR, "policy.prefill_route=round_robin", "policy.decode_route=least_loaded", "engine.stream_interval=3"],
    ],
    ids=["one mixed worker", "a prefill and a mixed one", "without a monitor"],
)
def test_the_same_tokens(overrides: list[str], request: pytest.FixtureRequest) -> None:
    """Memory is short, so that offers are refused: without a monitor too, that must not wait for ever."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as table:
        table.write("prefill = [[1, 0.001], [256, 0.002]]\ndecode = [[1, 0.001], [32, 0.002]]\n")
        table.flush()
        short = ["emulated.blocks=160", "emulated.context=2048", "engine.chunk_tokens=256", "cluster.heartbeat_s=0.1"]
        with LiveCluster(overrides=[f"engine.cost={table.name}", *short, *overrides]) as cluster:
            blind = "without a monitor" in request.node.name  # goes on, but slowly
            if blind:
                cluster.kill("monitor")
            pressure = Pressure(cluster, width=10, prompt=700, output=60)
            results = pressure.run(lambda: pressure.more(8 if blind else 30))
            assert {result.receipt.attempts for result in results} == {1}
            decoders = {result.receipt.decode_instance for result in results}
            assert decoders == {"m0"}
            if len(cluster.config.workers) == 2:
                assert {result.receipt.prefill_instance for result in results} == {"p0", "m0"}
