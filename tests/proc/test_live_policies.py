"""Other policies and settings than the defaults, live: the same tokens, and nothing left."""

from __future__ import annotations

import tempfile

import pytest
from live import LiveCluster, wait_until
from traffic import Pressure

from tetri.client import RequestFailed

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


def test_a_stream_interval_sends_fewer_and_longer_messages() -> None:
    """The first token, and the last ones, come at once all the same."""
    with LiveCluster(overrides=["engine.stream_interval=16"]) as cluster:
        stream = cluster.client().stream([7] * 40, max_tokens=100)
        pieces = list(stream)
        assert stream.result is not None and len(stream.result.token_ids) == 100
        assert "".join(pieces) == stream.result.text
        assert 2 < len(pieces) <= 12  # of a hundred


def test_a_prompt_too_long_for_one_mixed_worker_gets_a_clear_error_and_stops_nobody() -> None:
    """44 blocks: more than half of the memory, and more than the store keeps for those that nobody has taken. No
    setting of the client helps."""
    small = ["emulated.blocks=64", "emulated.context=1024", "engine.chunk_tokens=256", "transfer.slab_blocks=20"]
    with LiveCluster(overrides=[ALONE, *small, "cluster.patience_s=2.5"]) as cluster:
        stream = cluster.client().stream([7] * 700, max_tokens=20)
        wait_until(lambda: cluster.instances()["m0"]["held"] == 1, "it does not come")
        assert cluster.client().generate([8] * 400, max_tokens=20).finish_reason == "length"
        with pytest.raises(RequestFailed, match="44 KV blocks, .* set transfer.slab_blocks to 61 at least"):
            stream.wait()
        cluster.wait_idle()
