"""What users of similar systems complain of and no other test here holds: a cluster that was left idle, a worker that
is asked to stop under load, a pair after its first error, clients that leave at any moment, and pickles."""

from __future__ import annotations

import ast
import asyncio
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveCluster, wait_until
from traffic import Pressure

from tetri.client import AsyncClient
from tetri.engine.emulated import reference
from tetri.request import Sampling

TETRI = Path(__file__).parents[2] / "tetri"
ONE_EACH = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]"
QUICK = ("cluster.heartbeat_s=0.05", "cluster.dead_s=2", "monitor.load_ms=20")
LEAVERS = 60


@pytest.fixture(params=["shm", "stream"], scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[LiveCluster]:
    with LiveCluster(overrides=[ONE_EACH, f"transfer.transport={request.param}", *QUICK]) as cluster:
        yield cluster
        cluster.wait_idle()


def ask(cluster: LiveCluster) -> None:
    """One answer, right at the first attempt and with all of its KV moved."""
    prompt, made = list(range(1, 700)), cluster.config.emulated
    result = cluster.client().generate(prompt, max_tokens=12)
    assert result.token_ids == reference(prompt, Sampling(max_tokens=12), made.vocabulary, made.token_bytes)
    receipt = result.receipt
    assert (receipt.adopted, receipt.recomputed, receipt.attempts) == (len(prompt), 0, 1)


def views(cluster: LiveCluster) -> int:
    status = cluster.client().status()
    return int(status["monitor"]["number"]) if status["monitor"] else 0


def test_left_idle_it_serves_as_before(pair: LiveCluster) -> None:
    """sglang 9926."""
    ask(pair)
    before, last = pair.instances(), views(pair) + 120  # 20 ms each: more than the silence that means dead
    wait_until(lambda: views(pair) >= last, "no views")
    ask(pair)
    after = pair.instances()
    assert {iid: each["incarnation"] for iid, each in before.items()} == {
        iid: each["incarnation"] for iid, each in after.items()
    }


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_worker_that_is_asked_to_stop_under_load_takes_no_request_along(victim: str) -> None:
    """dynamo 11173."""
    with LiveCluster() as cluster:
        pressure = Pressure(cluster)

        def stop() -> None:
            pressure.more(10)
            process = cluster.processes.pop(victim)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            pressure.more(10)
            cluster.start(victim)
            cluster.wait_ready(victim)
            pressure.more(10)

        pressure.run(stop)


def test_clients_that_leave_at_any_moment_leave_nothing(pair: LiveCluster) -> None:
    """vllm 50425 and 46283, dynamo 14507: queued, computing, moving, decoding, and in between."""
    rng = random.Random(5)

    async def leave(client: AsyncClient) -> str:
        prompt = [rng.randrange(1, 32000) for _ in range(rng.randint(1, 3000))]
        async with client.stream(prompt, max_tokens=4000, ignore_eos=True) as stream:  # not over by then
            await asyncio.sleep(rng.uniform(0.0, 0.5))
        return stream.result.finish_reason if stream.result else ""

    async def all_leave() -> list[str]:
        async with AsyncClient(pair.config.clients_address) as client:
            return await asyncio.gather(*(leave(client) for _ in range(LEAVERS)))

    reasons = asyncio.run(all_leave())
    start = time.monotonic()
    pair.wait_idle()
    wait_until(lambda: not any(each["slots_used"] for each in pair.instances().values()), "slots are left", 5)
    print(f"reclaimed after {time.monotonic() - start:.3f} s")
    assert reasons.count("cancelled") > LEAVERS // 4 and len(reasons) == LEAVERS
    ask(pair)


def test_nothing_here_reads_or_writes_pickles() -> None:
    """The field's worst holes (CVE-2025-32444, CVE-2026-3059): a peer's bytes that run as code."""
    unsafe = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    calls = {"send_pyobj", "recv_pyobj", "eval", "exec"}
    found = []
    for path in TETRI.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", "") or getattr(called, "id", "")
            allowed = name in calls and isinstance(called, ast.Attribute) and name in ("eval", "exec")
            if unsafe & {each.split(".")[0] for each in names} or (name in calls and not allowed):
                found.append(f"{path.name}:{getattr(node, 'lineno', 0)}")
    assert found == []
