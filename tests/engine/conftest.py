"""Real engines for the tests marked `model`: started once for each file, one process each."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from handover import Engines
from plain import Plain
from vllm_process import BLOCK_BYTES, WRITER_LAYERS, EngineProcess, arguments

from tetri.models import find


@pytest.fixture(scope="session")
def model() -> Path:
    return find("smollm2-135m")  # not there: a failure, for a skip would hide that nothing was compared


def started(*made: EngineProcess) -> Iterator[tuple[EngineProcess, ...]]:
    try:
        for engine in made:
            engine.wait_until_started()
        yield made
    finally:
        for engine in made:
            engine.stop()


def plain_vllm(factory: pytest.TempPathFactory, model: Path, dtype: str) -> Iterator[Plain]:
    """Its texts lie where all processes of this run of the tests find them."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"texts-{dtype}"
    folder.mkdir(exist_ok=True)
    made = Plain(folder, **arguments(model, dtype, 20, max_batch=4))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """Plain vLLM in float32."""
    yield from plain_vllm(tmp_path_factory, model, "float32")


@pytest.fixture(scope="module")  # not of the session: they take 5 GB, and other files start their own
def float32(model: Path, reference: Plain) -> Iterator[Engines]:
    fields = arguments(model, "float32", 181)
    for prefill, decode in started(EngineProcess("tetri", **fields), EngineProcess("tetri", **fields)):
        yield Engines(reference, prefill, decode, stop_ids=prefill.facts()[3])


@pytest.fixture(scope="module")
def bfloat16(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    fields = arguments(model, "bfloat16", 60)
    for reference in plain_vllm(tmp_path_factory, model, "bfloat16"):
        for made in started(EngineProcess("tetri", **fields), EngineProcess("tetri", **fields)):
            yield Engines(reference, *made, stop_ids=made[0].facts()[3])


@pytest.fixture
def engine(float32: Engines) -> Iterator[EngineProcess]:
    """The decode engine; whatever the test did, all blocks must be back and nothing may be left in vLLM."""
    made = float32.decode
    blocks = made.facts()[1].blocks
    assert made.free_blocks() == blocks
    yield made
    assert (made.free_blocks(), made.requests()) == (blocks, 0)


@pytest.fixture(scope="session")
def writer(model: Path) -> Iterator[EngineProcess]:
    """A Writer that keeps the states behind WRITER_LAYERS every 4 tokens. It has room for six blocks."""
    fields = {"model": model, "dtype": "float32", "kv_bytes": 7 * BLOCK_BYTES["float32"], "context": 640}
    fields |= {"batch": 8, "chunk_tokens": 128, "layers": WRITER_LAYERS, "every": 4}
    made = EngineProcess("writer", **fields)
    yield made  # not waited for: others start beside it
    made.stop()


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[list[int]]:
    """40 prompts of 1 to 2,000 tokens, block and chunk boundaries among them; half random ids, half a text."""
    from tokenizers import Tokenizer

    rng = random.Random(7)
    lengths = [1, 2, 127, 128, 129, 256, 257, 511, 512, 513, 640, 1000, 1024, 1025, 2000]
    lengths += [round(2 ** rng.uniform(0, 9.3)) for _ in range(40 - len(lengths))]
    licence = Path(__file__).parents[2] / "LICENSE"
    text = Tokenizer.from_file(str(model / "tokenizer.json")).encode(licence.read_text()).ids
    made = []
    for number, length in enumerate(lengths):
        start = rng.randrange(len(text) - min(length, len(text)) + 1)
        drawn = [rng.randrange(3, 49152) for _ in range(length)]
        made.append(text[start : start + length] if number % 2 and length <= len(text) else drawn)
    return made
