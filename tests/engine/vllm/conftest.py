"""Real engines for the tests marked `model`, one process each: started once for all files of a group."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from groups import Shared
from handover import Engines
from live import VLLM, LiveCluster
from plain import Plain
from vllm_process import BLOCK_BYTES, START_S, WRITER_LAYERS, EngineProcess, arguments

from tetri.models import find


@pytest.fixture(scope="session")
def model() -> Path:
    return find("smollm2-135m")  # not there: a failure, for a skip would hide that nothing was compared


@pytest.fixture(scope="session")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """Plain vLLM in float32. Its texts lie where all processes of this run of the tests find them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "texts"
    folder.mkdir(exist_ok=True)
    with contextlib.closing(Plain(folder, **arguments(model, "float32", 20, max_batch=4))) as made:
        yield made


@pytest.fixture
def float32(shared: Shared, model: Path, reference: Plain) -> Engines:
    """Two engines, which start at the same time, for all tests of a group: they take 5 GB."""

    def start(name: str) -> EngineProcess:
        fields = arguments(model, "float32", 181)
        return shared.get(name, lambda: contextlib.closing(EngineProcess("tetri", **fields)))

    return Engines(reference, start("prefill"), start("decode"))


@pytest.fixture
def cluster(shared: Shared) -> LiveCluster:
    """One worker of each role with the real model, whose events are recorded."""
    cpus = sorted(os.sched_getaffinity(0))
    settings = [f"worker.p0.cpus={cpus[0]}", f"worker.d0.cpus={cpus[-1]}", "model.dtype=float32", "model.context=2304"]
    settings += ["engine.max_batch=48", "engine.kv_mib=1100", "transfer.slab_blocks=24", "cluster.record=true"]
    made = shared.get("cluster", lambda: LiveCluster(VLLM, settings, START_S))
    made.wait_idle()
    return made


@pytest.fixture
def engine(float32: Engines) -> Iterator[EngineProcess]:
    """The decode engine; whatever the test did, all blocks must be back and nothing may be left in vLLM."""
    made = float32.decode
    blocks = made.facts()[1].blocks
    assert made.free_blocks() == blocks
    yield made
    assert (made.free_blocks(), made.engine_requests()) == (blocks, 0)


@pytest.fixture
def writer(shared: Shared, model: Path) -> EngineProcess:
    """A Writer that keeps the states behind WRITER_LAYERS every 4 tokens. It has room for six blocks."""
    fields = {"model": model, "dtype": "float32", "kv_bytes": 7 * BLOCK_BYTES["float32"], "context": 640}
    fields |= {"batch": 8, "chunk_tokens": 128, "layers": WRITER_LAYERS, "every": 4}
    # Not waited for: others start beside it.
    return shared.get("writer", lambda: contextlib.closing(EngineProcess("writer", **fields)))


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[list[int]]:
    """40 prompts of 1 to 2,000 tokens, block and chunk boundaries among them; half random ids, half a text."""
    from tokenizers import Tokenizer

    rng = random.Random(7)
    lengths = [1, 2, 127, 128, 129, 256, 257, 511, 512, 513, 640, 1000, 1024, 1025, 2000]
    lengths += [round(2 ** rng.uniform(0, 9.3)) for _ in range(40 - len(lengths))]
    licence = Path(__file__).parents[3] / "LICENSE"
    text = Tokenizer.from_file(str(model / "tokenizer.json")).encode(licence.read_text()).ids
    made = []
    for number, length in enumerate(lengths):
        start = rng.randrange(len(text) - min(length, len(text)) + 1)
        drawn = [rng.randrange(3, 49152) for _ in range(length)]
        made.append(text[start : start + length] if number % 2 and length <= len(text) else drawn)
    return made
