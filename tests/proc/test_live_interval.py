"""Decode workers that keep tokens back (`stream_interval`) while requests are cut short in every way: no token is lost,
repeated or made up, and what was kept back at such a moment harms nobody."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
from live import LiveCluster, wait_until

from tetri.engine.emulated import reference
from tetri.request import Sampling

INTERVAL = 64
STEP_S = 0.004
PROMPT = [3] * 50


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    workers = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]"
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as table:
        table.write(f"prefill = [[1, {STEP_S}], [512, 0.01]]\ndecode = [[1, {STEP_S}], [32, {STEP_S}]]\n")
        table.flush()
        interval = [f"engine.stream_interval={INTERVAL}", "emulated.blocks=600"]
        with LiveCluster(overrides=[f"engine.cost={table.name}", workers, *interval]) as cluster:
            yield cluster


@pytest.fixture(autouse=True)
def nothing_left(cluster: LiveCluster) -> Iterator[None]:
    yield
    cluster.wait_idle()


def right(cluster: LiveCluster, length: int) -> list[int]:
    made = cluster.config.emulated
    return reference(PROMPT, Sampling(max_tokens=length), made.vocabulary, made.token_bytes)


def test_what_came_before_a_deadline_is_right(cluster: LiveCluster) -> None:
    result = cluster.client().generate(PROMPT, max_tokens=8000, deadline_s=0.5)
    assert result.finish_reason == "deadline"
    assert result.token_ids and result.token_ids == right(cluster, len(result.token_ids))


@pytest.mark.parametrize("at", [0, 1, 5, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL + 3])
def test_a_stop_text_among_tokens_that_come_together(cluster: LiveCluster, at: int) -> None:
    """What was computed beyond it does not count."""
    words = [f"{token:x} " for token in right(cluster, at + 2)]
    stop = words[at] + words[at + 1][:1]
    result = cluster.client().generate(PROMPT, max_tokens=8000, stop=[stop])
    assert result.finish_reason == "stop" and stop not in result.text and not result.text.endswith(words[at])
    assert result.token_ids == right(cluster, at + 2) and result.usage.completion_tokens == at + 2


def test_status_shows_how_long_steps_take_over_what_the_table_predicts(cluster: LiveCluster) -> None:
    """An emulated step takes at least the time of the table, and on a busy machine any time longer."""

    def ratios() -> list[float | None]:
        cluster.client().generate(PROMPT, max_tokens=200)
        found = {iid: each["step_ratio"] for iid, each in cluster.instances().items()}
        assert found["p0"]["decode"] is found["d0"]["prefill"] is None
        return [found["p0"]["prefill"], found["d0"]["decode"]]

    wait_until(lambda: None not in ratios(), "too few steps were compared")
    assert all(ratio is not None and ratio > 0.99 for ratio in ratios())
