"""An engine in a process of its own, on one core, called through a pipe: vLLM can be there once per process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import starts
from forks import Program

from tetri.engine.base import EngineError, HiddenStateHook, HiddenStates
from tetri.kv.base import parts
from tetri.models import weights_hash
from tetri.request import Sampling

if TYPE_CHECKING:
    from tetri.engine.vllm.writer import WrittenText

CORES = sorted(os.sched_getaffinity(0))
START_S = 240.0

CONTEXT = 2304
WRITER_LAYERS = (1, 16, 29)
BLOCK_BYTES = {"bfloat16": 30 * 3 * 128 * 128 * 2, "float32": 30 * 3 * 128 * 128 * 4}


def arguments(model: Path, dtype: str, blocks: int, max_batch: int = 48) -> dict[str, Any]:
    """Of VllmEngine and of Reference; the KV space holds `blocks`, vLLM's null block among them."""
    return {
        "model": model,
        "dtype": dtype,
        "chunk_tokens": 512,
        "max_batch": max_batch,
        "kv_bytes": blocks * BLOCK_BYTES[dtype],
        "context": CONTEXT,
        "weights": weights_hash(model),
    }


class EngineProcess:
    """`kind` is "tetri" (VllmEngine, with what the tests want to see of it), "reference" (tests' Reference) or "writer"
    (tetri.engine.vllm.writer)."""

    def __init__(self, kind: str, **arguments: Any) -> None:
        with Listener() as listener:
            self._process = Program("engine", [listener.address], vllm=True)
            self._pipe = listener.accept()
        self._pipe.send((kind, arguments))
        starts.engines += 1
        self._started = False

    def wait_until_started(self) -> None:
        if not self._started:
            if not self._pipe.poll(START_S):
                raise TimeoutError(f"an engine did not start within {START_S:.0f} s")
            self._started = True
            self._result()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.wait_until_started()
            self._pipe.send((name, arguments))
            return self._result()

        return call

    def _result(self) -> Any:
        kind, value = self._pipe.recv()
        if kind == "refused":
            raise EngineError(value)
        if kind == "failed":
            raise RuntimeError(f"in the engine's process:\n{value}")
        return value

    def close(self) -> None:
        self._pipe.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(20)


def serve() -> None:
    """In the process of the engine: make what is asked for, then answer calls."""
    pipe = Client(sys.argv[1])
    kind, arguments = pipe.recv()
    os.sched_setaffinity(0, {CORES[-1] if kind == "tetri" else CORES[0]})
    try:
        engine = _make(kind, arguments)
    except EngineError as error:
        pipe.send(("refused", str(error)))
        return
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
        return
    pipe.send(("done", None))
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", getattr(engine, name)(*args)))
        except EngineError as error:
            pipe.send(("refused", str(error)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


def _make(kind: str, arguments: dict[str, Any]) -> Any:
    from tetri.engine.vllm.setup import prepare_environment

    prepare_environment()
    if kind == "tetri":
        return _Watched(arguments)
    if kind == "writer":
        return _Writing(arguments)
    from reference import Reference

    return Reference(**arguments)


class _Watched:
    """VllmEngine with bytes for memoryviews, and with what only a test asks."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from tetri.engine.vllm.engine import VllmEngine

        self.engine = VllmEngine(**arguments)
        self._hook: HiddenStateHook | None = None

    def facts(self) -> tuple[Any, Any, int, tuple[int, ...]]:
        engine = self.engine
        return engine.fingerprint, engine.capacity, engine.block_bytes, engine._stop_ids

    def __getattr__(self, name: str) -> Any:
        """add, cancel, admit, hold, stay and step are the engine's."""
        return getattr(self.engine, name)

    def export(self, key: str, start: int, stop: int) -> list[bytearray]:
        buffers = [bytearray(self.engine.block_bytes) for _ in range(start, stop)]
        self.engine.export(key, start, stop, [memoryview(buffer) for buffer in buffers])
        return buffers

    def adopt(self, key: str, start: int, blocks: Sequence[bytes | tuple[bytes, ...]]) -> None:
        self.engine.adopt(key, start, [tuple(map(memoryview, parts(block))) for block in blocks])

    def digests(self, key: str, start: int, stop: int) -> list[str]:
        from reference import digest

        return [digest(block) for block in self.export(key, start, stop)]

    def free_blocks(self) -> int:
        return self.engine._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def fill_next(self, count: int, byte: int) -> None:
        from reference import fill_blocks, next_free_blocks

        blocks = next_free_blocks(self.engine._scheduler.kv_cache_manager, count)
        fill_blocks(self.engine._memory.caches, blocks, byte)

    def engine_requests(self) -> int:
        return len(self.engine._requests) + len(self.engine._scheduler.requests)

    def hook_hidden_states(self, layers: Sequence[int], every: int) -> None:
        self.untap()
        self._hook = self.engine.hook_hidden_states(layers, every)

    def collect(self) -> HiddenStates | None:
        return self._hook.collect() if self._hook else None

    def untap(self) -> None:
        if self._hook:
            self._hook.close()
        self._hook = None

    def start_another(self, arguments: dict[str, Any]) -> None:
        from tetri.engine.vllm.engine import VllmEngine

        VllmEngine(**arguments)


class _Writing:
    """tetri.engine.vllm.writer.Writer, that writes several texts at once to their ends."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from tetri.engine.vllm.writer import Writer

        self.writer = Writer(**arguments)

    def write(self, wanted: dict[str, tuple[list[int], Sampling]]) -> tuple[dict[str, WrittenText], set[str]]:
        """The texts, and which of them were preempted on the way."""
        for key, (prompt, sampling) in wanted.items():
            self.writer.add(key, prompt, sampling)
        texts: dict[str, WrittenText] = {}
        preempted: set[str] = set()
        while len(self.writer):
            texts |= {text.key: text for text in self.writer.step()}
            requests = self.writer._core.scheduler.requests
            preempted |= {key for key, request in requests.items() if request.num_preemptions}
        return texts, preempted

    def add(self, key: str, prompt: list[int], sampling: Sampling) -> None:
        self.writer.add(key, prompt, sampling)
