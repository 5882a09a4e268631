"""A receiver without memory, live: four instances that prefill for one that decodes, and whose slabs hold eight chunks.
Intake slows, everything completes, nothing is computed twice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from live import LiveCluster, wait_until
from traffic import Pressure

from tetri.client import AsyncClient
from tetri.proc.recorder import read

CHUNK, BLOCK, SLAB = 64, 16, 32  # tokens, tokens, blocks: eight chunks
REQUESTS, LONGEST = 64, 400  # tokens of a prompt; the shortest has half of that
BLOCKS = 32  # of each engine: not even two of the larger requests
PREFILLS = ", ".join(f"{{iid='p{number}', role='prefill'}}" for number in range(4))
SETTINGS = [
    f"worker=[{PREFILLS}, {{iid='d0', role='decode'}}]",
    f"engine.chunk_tokens={CHUNK}",
    f"engine.block_tokens={BLOCK}",
    f"transfer.slab_blocks={SLAB}",
    f"emulated.blocks={BLOCKS}",
    f"emulated.context={BLOCKS * BLOCK}",
    "policy.length=oracle",  # and nobody is preempted, which is another way to compute something twice
    "policy.admit=peak",
    "monitor.load_ms=20",
    "cluster.record=true",
]
COST = "prefill = [[1, 0.001], [64, 0.002]]\ndecode = [[1, 0.001], [32, 0.002]]\n"


class Burst(Pressure):
    """`width` requests at once, and no more after them."""

    async def one_after_another(self, client: AsyncClient) -> None:
        await self.one(client)


@dataclass(frozen=True)
class Seen:
    """What `status` said at one moment: requests by stage, prompts queued and slots taken by prefill instance."""

    stages: dict[str, int]
    queued: dict[str, int]
    slots: dict[str, int]

    @classmethod
    def of(cls, status: dict[str, Any]) -> Seen:
        prefills = [instance for instance in status["instances"] if instance["role"] == "prefill"]
        queued = {instance["iid"]: instance["queued"] for instance in prefills}
        return cls(status["requests"], queued, {each["iid"]: each["slots_used"] for each in prefills})

    def begun(self) -> int:
        """Prompts that are computed, in part or wholly, and whose KV is not all at the decode instance."""
        return self.stages.get("prefill", 0) + self.stages.get("moving", 0)


def refusals(cluster: LiveCluster) -> Iterator[str]:
    for path in (cluster.folder / "record").glob("p*.events"):
        yield from (call.event[0][0] for call in read(path)[1] if call.event and call.event[0][0] == "Refuse")


def test_a_receiver_with_no_memory_slows_the_intake_and_nothing_is_computed_twice() -> None:
    seen: list[Seen] = []
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as table:
        table.write(COST)
        table.flush()
        with LiveCluster(overrides=[f"engine.cost={table.name}", *SETTINGS]) as cluster:
            burst, client = Burst(cluster, width=REQUESTS, prompt=LONGEST, output=24), cluster.client()

            def all_answered() -> bool:
                seen.append(Seen.of(client.status()))
                return len(burst.answers) == REQUESTS

            def watch() -> None:
                wait_until(all_answered, "not all have completed", 60)

            receipts = [result.receipt for result in burst.run(watch)]
            assert len(receipts) == REQUESTS and {receipt.decode_instance for receipt in receipts} == {"d0"}
            assert {(receipt.attempts, receipt.recomputed, receipt.preempted) for receipt in receipts} == {(1, 0, 0)}
            assert {receipt.prefill_instance for receipt in receipts} == {"p0", "p1", "p2", "p3"}
            assert len([*refusals(cluster)]) > REQUESTS, "memory was not short: this test shows nothing"
            wait_until(lambda: not any(Seen.of(client.status()).slots.values()), "slots are still taken")

    # Whoever cannot leave stays in the slab, and a prompt is begun only when those before it have left.
    most = 4 * (SLAB // (LONGEST // 2 // BLOCK) + 1)
    assert max(each.begun() for each in seen) <= most < REQUESTS // 3
    assert max(sum(each.queued.values()) for each in seen) > REQUESTS // 2
    assert {*seen[0].slots} == {"p0", "p1", "p2", "p3"}
    assert SLAB // 2 < max(slots for each in seen for slots in each.slots.values()) <= SLAB
