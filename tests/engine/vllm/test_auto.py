"""Two workers in the role auto with the real model: requests stay where they were prefilled while that is possible, and
have the same tokens as plain vLLM wherever they decode, also after flips and after one of the workers was killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from live import LiveCluster, wait_until

from tetri.client import AsyncClient, Result
from tetri.request import Sampling, Slo

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TOKENS = 16
EASY = Slo(ttft_s=600.0, tpot_s=60.0)  # with limits that are far away the phases are never kept apart
WIDTH = 4  # requests that are open at a time, of those that follow one another
#: When so many requests have ended, an instance gets a role.
FLIPS = [(4, "p0", "prefill"), (18, "p0", "auto"), (20, "d0", "prefill"), (34, "d0", "auto")]


@pytest.fixture
def autos(cluster: LiveCluster) -> Iterator[LiveCluster]:
    """The workers of the cluster, both in the role auto."""
    operator = cluster.operator(timeout=60)
    for iid in ("d0", "p0"):
        operator.flip(iid, "auto")
    yield cluster
    operator.flip("p0", "prefill")
    operator.flip("d0", "decode")


def test_no_kv_moves_while_both_are_equally_loaded(autos, prompts, reference) -> None:
    chosen = sorted(prompts, key=len)[:20]
    results = autos.answers(chosen, slo=EASY, max_tokens=TOKENS, ignore_eos=True)
    for prompt, result in zip(chosen, results, strict=True):
        receipt = result.receipt
        assert (receipt.local, receipt.adopted, receipt.recomputed) == (len(prompt), 0, 0)
        assert (receipt.kv_bytes, receipt.chunks) == (0, 0)
        assert receipt.prefill_instance == receipt.decode_instance
        assert reference.text(prompt, TOKENS).agrees(result.token_ids), f"prompt of {len(prompt)} tokens"
    assert {result.receipt.decode_instance for result in results} == {"p0", "d0"}


def test_requests_that_stay_and_requests_that_move_have_the_same_tokens(autos, prompts, reference, capsys) -> None:
    """Both instances flip to prefill and back while requests come: what one prefills meanwhile moves to the other."""
    texts = [reference.text(prompt, TOKENS) for prompt in prompts]
    results: dict[int, Result] = {}

    def flips() -> None:
        operator = autos.operator(timeout=60)
        for wanted, iid, role in FLIPS:
            wait_until(lambda wanted=wanted: len(results) >= wanted, "no answers", 120)
            operator.flip(iid, role)

    async def caller(client: AsyncClient, waiting: Iterator[int]) -> None:
        for index in waiting:
            results[index] = await client.generate(prompts[index], slo=EASY, max_tokens=TOKENS, ignore_eos=True)

    async def run() -> None:
        waiting = iter(range(len(prompts)))
        async with AsyncClient(autos.config.clients_address, timeout=240) as client:
            await asyncio.gather(asyncio.to_thread(flips), *(caller(client, waiting) for _ in range(WIDTH)))

    asyncio.run(run())
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        receipt = results[index].receipt
        assert (receipt.kept, receipt.recomputed, receipt.attempts) == (len(prompt), 0, 1)
        assert receipt.adopted in (0, len(prompt)), "only part of it moved"
        assert text.agrees(results[index].token_ids), f"prompt {index}, {receipt}"
    moved = sorted({_way(result) for result in results.values() if result.receipt.adopted})
    stayed = sorted({_way(result) for result in results.values() if result.receipt.local})
    with capsys.disabled():
        count = sum(result.receipt.adopted > 0 for result in results.values())
        print(f" {count} of {len(prompts)} moved", end="")
    assert moved == [("d0", "p0"), ("p0", "d0")] and {("p0", "p0"), ("d0", "d0")} <= {*stayed}


def _way(result: Result) -> tuple[str, str]:
    return result.receipt.prefill_instance, result.receipt.decode_instance


def test_kill_9_of_one_of_them(autos, prompts, reference) -> None:
    """Its requests go on at the other one with no token lost, repeated or changed, for greedy and for drawn text; then
    it comes back in its role."""
    prompt = next(prompt for prompt in prompts if len(prompt) == 256)
    samplings = [
        {"max_tokens": 90, "ignore_eos": True},
        {"max_tokens": 90, "ignore_eos": True, "temperature": 0.8, "seed": 3},
    ]
    texts = [reference.generate(prompt, Sampling(**sampling)).ids for sampling in samplings]

    async def run() -> list[Result]:
        async with AsyncClient(autos.config.clients_address, timeout=240) as client:
            tasks = [asyncio.create_task(client.generate(prompt, **sampling)) for sampling in 2 * samplings]
            await asyncio.to_thread(wait_until, _all_run(autos, len(tasks)), "they do not run on both")
            autos.kill("d0")
            return await asyncio.gather(*tasks)

    results = asyncio.run(run())
    for text, result in zip(2 * texts, results, strict=True):
        assert result.token_ids == text and result.receipt.decode_instance == "p0"
    assert {result.receipt.attempts for result in results} == {1, 2}
    autos.start("d0", "--set", "worker.d0.role=auto")
    autos.wait_ready("d0")
    assert autos.roles() == {"p0": "auto", "d0": "auto"}


def _all_run(cluster: LiveCluster, count: int) -> Callable[[], bool]:
    def there() -> bool:
        running = [instance["load"]["running"] for instance in cluster.instances().values()]
        return sum(running) == count and min(running) > 0

    return there
