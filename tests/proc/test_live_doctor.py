"""tetri-cli doctor beside a live cluster: healthy while it serves, plain about what kill -9 leaves, and nothing is left
once the worker is started again."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

from live import LiveCluster, wait_until

from tetri.client import AsyncClient, Result
from tetri.engine.emulated import reference
from tetri.request import Sampling

ONE_EACH = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]"


def doctor(cluster: LiveCluster) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-c", "from tetri.cli import main; main()", "doctor", "--json"]
    command += ["--conf", str(cluster.conf), *[part for override in cluster.overrides for part in ("--set", override)]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_what_a_killed_worker_leaves_is_shown_until_it_is_started_again() -> None:
    with LiveCluster(overrides=[ONE_EACH]) as cluster:
        prompt = list(range(1, 200))
        with cluster.client() as client:
            before = client.generate(prompt, max_tokens=5).token_ids
        cluster.wait_idle()
        status, said = doctor(cluster)
        assert (status, said["problems"]) == (0, [])
        found = {segment["instance"]: segment for segment in said["segments"]}
        assert {iid: found[iid]["pid"] for iid in found} == {iid: cluster.processes[iid].pid for iid in ("p0", "d0")}
        assert all(segment["alive"] and not segment["used"] for segment in found.values())
        assert all(each["alive"] for each in said["sockets"]) and len(said["sockets"]) >= 3

        left = found["p0"]["name"]
        cluster.kill("p0")
        status, said = doctor(cluster)
        assert status == 1
        assert any(left in problem and "p0" in problem and "is dead" in problem for problem in said["problems"])
        assert left in cluster.segments()

        cluster.start("p0")
        cluster.wait_ready("p0")
        assert left not in cluster.segments() and len(cluster.segments()) == 2
        wait_until(lambda: doctor(cluster)[0] == 0, "something stays wrong")
        with cluster.client() as client:
            assert client.generate(prompt, max_tokens=5).token_ids == before
        cluster.wait_idle()
        for name in ("p0", "d0", "broker"):
            assert "Traceback" not in cluster.log(name)


def test_segments_that_are_removed_while_requests_run_cost_no_attempt_and_are_told() -> None:
    """As systemd-logind does when the user logs out; receivers that have not opened them yet do so now."""
    with LiveCluster() as cluster:
        prompts = [list(range(number, number + 900)) for number in range(1, 41)]

        async def answered() -> list[Result]:
            async with AsyncClient(cluster.config.clients_address, timeout=60) as client:
                running = [asyncio.create_task(client.generate(prompt, max_tokens=40)) for prompt in prompts]
                await asyncio.wait(running[:1], timeout=0.05)
                for name in cluster.segments():
                    os.unlink(f"/dev/shm/{name}")
                return await asyncio.gather(*running)

        results, made = asyncio.run(answered()), cluster.config.emulated
        assert cluster.segments() == []
        for tokens, part in ((40, results), (2, cluster.answers(prompts, max_tokens=2))):
            rules = Sampling(max_tokens=tokens), made.vocabulary, made.token_bytes
            right = [reference(prompt, *rules) for prompt in prompts]
            assert [result.token_ids for result in part] == right
            assert {(result.receipt.attempts, result.receipt.recomputed) for result in part} == {(1, 0)}

        def noted() -> bool:
            return all("tetri-cli doctor" in instance["note"] for instance in cluster.instances().values())

        wait_until(noted, "the status does not say it")
        status, said = doctor(cluster)
        assert status == 1 and len(said["problems"]) == len(said["segments"]) == 4
        assert all("RemoveIPC=no" in problem for problem in said["problems"])
        assert {segment["instance"] for segment in said["segments"]} == {*cluster.instances()}
