"""Workers between which KV can never move: they are never paired, and the status says why in one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live import LiveCluster, wait_until

from tetri.engine.emulated import reference
from tetri.request import Sampling

ONE_EACH = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]"
SAMPLING = Sampling(max_tokens=12)
OTHERS = {  # by how a worker is started by hand: the difference that is named
    "emulated.token_bytes=128": "block_bytes differs: 2048 and 1024",
    "engine.block_tokens=32": "block_tokens differs: 32 and 16",
    "transfer.transport=stream": "no common KV path: stream and shm; set transfer.transport alike on both",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with LiveCluster(overrides=[ONE_EACH]) as made:
        yield made
        made.wait_idle()


@pytest.mark.parametrize("change", OTHERS)
def test_a_worker_of_another_layout_or_transport_is_never_chosen(change: str, cluster: LiveCluster) -> None:
    iid = f"d-{change.split('.')[1].split('=')[0]}"
    cluster.start(iid, "--role", "decode", "--broker", cluster.config.events_address, "--set", change)
    cluster.wait_ready(iid)
    assert cluster.instances()[iid]["paths"] == {} and cluster.instances()["p0"]["paths"] == {"shm": 1}
    assert cluster.instances()[iid]["note"] == f"never paired with p0: {OTHERS[change]}"
    assert cluster.instances()["p0"]["note"].startswith(f"never paired with {iid}: ")
    made, prompt = cluster.config.emulated, list(range(1, 101))
    expected = reference(prompt, SAMPLING, made.vocabulary, made.token_bytes)
    for _ in range(8):
        result = cluster.client().generate(prompt, max_tokens=SAMPLING.max_tokens)
        assert result.token_ids == expected
        assert (result.receipt.decode_instance, result.receipt.attempts) == ("d0", 1)
    cluster.kill(iid)
    wait_until(lambda: cluster.instances()["p0"]["note"] == "", "p0 is still told to be strange")
