"""How much memory the workers need, and how much of it in /dev/shm, compared with what this machine and its control
groups have. An estimate: nothing is refused because of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetri import models
from tetri.config import Config, WorkerConfig
from tetri.control_groups import folders, read
from tetri.kv.segment import free_bytes, megabytes, size_of
from tetri.kv.shm import DIRECTORY

MIB = 1 << 20
# Measured: a vLLM worker without weights, KV cache and slab (libraries, activations); an emulated worker; a
# gateway; the rest.
VLLM, EMULATED, GATEWAY, OTHERS = 800 * MIB, 64 * MIB, 80 * MIB, 250 * MIB
UNKNOWN = 1 << 62
# Files of a control group's limit and use, and the prefix in memory.stat: of version 2 and of version 1.
NAMES = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of one number


@dataclass(frozen=True, slots=True)
class Balance:
    """What is `needed` and `available`, in bytes. `text` says both in one line."""

    needed: int
    available: int
    text: str


def shortage(config: Config, iid: str | None = None) -> str | None:
    """One line that says why the memory may not do for all programs, or for the worker `iid`; None when it is
    enough."""
    found = balance(config, iid)
    if found.needed <= found.available:
        return None
    kv = f"lower engine.kv_mib ({config.engine.kv_mib}), " if config.engine.kind == "vllm" else ""
    return f"{found.text}: {kv}configure fewer workers or add memory, or the kernel may kill a worker"


def balance(config: Config, iid: str | None = None) -> Balance:
    """Memory needed by all programs together, or by the worker `iid` alone, beside what is available."""
    if iid is not None:
        needed = _worker_bytes(config, config.worker(iid))
        who = f"worker {iid} needs about {megabytes(needed)} of memory"
    else:
        sizes = Counter(_worker_bytes(config, worker) for worker in config.workers)
        needed = OTHERS + GATEWAY * config.gateway.count + sum(size * count for size, count in sizes.items())
        workers = ", ".join(f"{count} of {megabytes(size)}" for size, count in sizes.items())
        who = f"the programs need about {megabytes(needed)} of memory (workers: {workers})"
    left, where = available()
    return Balance(needed, left, f"{who}, {megabytes(left)} are available ({where})")


def shm_shortage(config: Config, free: int | None = None) -> str | None:
    """One line that says why /dev/shm is too small for the slabs of all workers; None when it is large enough, or when
    only the engine can tell how large they are. `free`: its free bytes, by default those of now."""
    slabs = [_slab_bytes(config, worker) for worker in config.workers]
    needed, left = sum(slabs), free_bytes(DIRECTORY) if free is None else free
    if needed <= left:
        return None
    return (
        f"{DIRECTORY} is too small for the KV slabs of {sum(map(bool, slabs))} workers: {megabytes(needed)} needed,"
        f" {megabytes(left)} free; enlarge it (docker run --shm-size={-(-needed // MIB) + 64}m) or lower"
        f" transfer.slab_blocks ({config.transfer.slab_blocks})"
    )


def available(proc: Path = Path("/proc")) -> tuple[int, str]:
    """Bytes that new processes can get, and what limits them: this machine or the control group with the least. Without
    an end where the kernel does not say."""
    return min([*_machine(proc), *_groups(proc)], default=(UNKNOWN, "the kernel does not say"))


def _machine(proc: Path) -> Iterator[tuple[int, str]]:
    facts = dict(line.split(":", 1) for line in read(proc / "meminfo").splitlines())
    if "MemAvailable" in facts:
        free = [facts.get(name, "0 kB").split()[0] for name in ("MemAvailable", "SwapFree")]
        yield sum(map(int, free)) << 10, "this machine"


def _groups(proc: Path) -> Iterator[tuple[int, str]]:
    """What each control group of this process that has a limit can still get."""
    for folder in folders("memory", proc / "self"):
        for limit, usage, prefix in NAMES:
            most, used = read(folder / limit), read(folder / usage)
            if most.isdigit() and used.isdigit():  # not "max"
                left = int(most) - int(used) + _cache(folder, prefix)
                yield max(left, 0), f"limit of the control group {folder}"


def _cache(folder: Path, prefix: str) -> int:
    """Bytes of cached files of a group, which the kernel drops before it kills."""
    facts = dict(line.split() for line in read(folder / "memory.stat").splitlines())
    return sum(int(facts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _worker_bytes(config: Config, worker: WorkerConfig) -> int:
    slab = _slab_bytes(config, worker)
    if config.engine.kind == "emulated":
        return EMULATED + slab + config.emulated.blocks * _block_bytes(config)
    if worker.gpu >= 0:
        return VLLM + slab
    folder = models.find(config.model.name)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored = _facts(folder).get("dtype") or _facts(folder).get("torch_dtype")
    weights = weights * ITEM[config.model.dtype] // ITEM.get(str(stored), ITEM[config.model.dtype])
    return VLLM + weights + (config.engine.kv_mib << 20) + slab


def _slab_bytes(config: Config, worker: WorkerConfig) -> int:
    """Size of a worker's slab in /dev/shm; 0 for one in GPU memory, or when only the engine knows the size."""
    transport = config.transfer.transport
    if transport == "cuda_ipc" or (transport == "auto" and worker.gpu >= 0):
        return 0
    block = _block_bytes(config)
    return size_of(config.transfer.slab_blocks, block) if block else 0


def _block_bytes(config: Config) -> int:
    """Bytes of one KV block, 0 when the checkpoint's config.json does not tell in the usual way."""
    if config.engine.kind == "emulated":
        return config.engine.block_tokens * config.emulated.token_bytes
    facts = _facts(models.find(config.model.name))
    try:
        heads = facts.get("num_key_value_heads") or facts["num_attention_heads"]
        width = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
        token_bytes = facts["num_hidden_layers"] * heads * 2 * width * ITEM[config.model.dtype]
        return int(token_bytes * config.engine.block_tokens)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0


def _facts(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the worker's error says what is wrong with it
    return found if isinstance(found, dict) else {}
