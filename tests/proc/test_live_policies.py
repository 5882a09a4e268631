"""Other policies and settings than the defaults, live, and no monitor: the same tokens, and nothing left."""

from __future__ import annotations

import tempfile

from live import LiveCluster
from traffic import Pressure

SETTINGS = [
    "worker=[{iid='p0', role='prefill'}, {iid='m0', role='mixed'}]",
    *("policy.prefill_route=round_robin", "policy.decode_route=least_loaded", "policy.order=deadline"),
    *("policy.admit=reserve_static", "policy.length=oracle", "engine.stream_interval=3"),
    *("emulated.blocks=160", "emulated.context=2048", "engine.chunk_tokens=256", "cluster.heartbeat_s=0.1"),
]


def test_the_same_tokens() -> None:
    """Memory is short, so that offers are refused: that must not wait for ever."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as table:
        table.write("prefill = [[1, 0.001], [256, 0.002]]\ndecode = [[1, 0.001], [32, 0.002]]\n")
        table.flush()
        with LiveCluster(overrides=[f"engine.cost={table.name}", *SETTINGS]) as cluster:
            cluster.kill("monitor")  # it goes on, but slowly
            pressure = Pressure(cluster, width=10, prompt=700, output=60)
            receipts = [result.receipt for result in pressure.run(lambda: pressure.more(8))]
            assert {receipt.attempts for receipt in receipts} == {1}
            assert {receipt.decode_instance for receipt in receipts} == {"m0"}
            assert {receipt.prefill_instance for receipt in receipts} == {"p0", "m0"}
