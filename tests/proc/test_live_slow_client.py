"""Clients whose process is stopped for longer than the broker remembers an ended request: all that was said to them
waits in their connection, and they read it to its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from live import LiveCluster, wait_until

from tetri.client import Client, RequestRefused

REQUESTS, TOKENS = 3, 400
PROGRAM = """
import asyncio, json, sys, tetri
async def main():
    async with tetri.AsyncClient(sys.argv[1], silence_s=0.3, resend_s=0.2) as client:
        streams = [client.stream("hi", max_tokens=TOKENS, ignore_eos=True, seed=seed) for seed in range(REQUESTS)]
        first = [await anext(stream) for stream in streams]
        print(json.dumps([stream.rid for stream in streams]), flush=True)
        results = [await stream.wait() for stream in streams]
        print(json.dumps([result.usage.completion_tokens for result in results]))
asyncio.run(main())
"""
BLOCKING = """
import json, sys, tetri
with tetri.Client(sys.argv[1], silence_s=0.3, resend_s=0.2) as client:
    streams = [client.stream("hi", max_tokens=TOKENS, ignore_eos=True, seed=seed) for seed in range(REQUESTS)]
    first = [next(stream) for stream in streams]
    print(json.dumps([stream.rid for stream in streams]), flush=True)
    print(json.dumps([stream.wait().usage.completion_tokens for stream in streams]))
"""


@pytest.fixture(scope="module")
def cluster():
    with LiveCluster(overrides=["broker.client_grace_s=0.3"]) as cluster:
        yield cluster
        cluster.wait_idle()


def forgotten(cluster: LiveCluster, rid: str) -> bool:
    """Whether the broker knows it no more. Asking for the end of what has ended prolongs nothing."""
    with Client(cluster.config.clients_address) as client:
        try:
            client.cancel(rid)
        except RequestRefused:
            return True
    return False


@pytest.mark.parametrize("program", [PROGRAM, BLOCKING], ids=["async", "sync"])
def test_a_stopped_client_gets_what_was_said_although_it_is_forgotten(cluster, program) -> None:
    code = f"TOKENS, REQUESTS = {TOKENS}, {REQUESTS}\n{program}"
    with Client(cluster.config.clients_address) as observer:
        ended = observer.status()["counters"].get("ended_length", 0)
        process = subprocess.Popen(
            [sys.executable, "-c", code, cluster.config.clients_address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            rids = json.loads(process.stdout.readline())
            process.send_signal(signal.SIGSTOP)

            def all_ended() -> bool:
                return observer.status()["counters"].get("ended_length", 0) == ended + REQUESTS

            wait_until(all_ended, "they did not end")
            for rid in rids:
                wait_until(lambda rid=rid: forgotten(cluster, rid), f"{rid} is not forgotten")
            process.send_signal(signal.SIGCONT)
            out, errors = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
    assert (errors, json.loads(out)) == ("", [TOKENS] * REQUESTS)
