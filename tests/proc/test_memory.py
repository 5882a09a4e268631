"""What the workers need, and what control groups and /dev/shm leave; the folders of the kernel are made here."""

import json
import os

import pytest

from tetri.config import load
from tetri.kv.shm import ShmSlab
from tetri.proc import memory

PAIR = '[[worker]]\niid = "p0"\nrole = "prefill"\n[[worker]]\niid = "d0"\nrole = "decode"\n'
MIB = 1 << 20
GIB = 1 << 30
LLAMA = {"num_hidden_layers": 30, "num_key_value_heads": 3, "num_attention_heads": 9, "hidden_size": 576}
BLOCK = 30 * 3 * 64 * 2 * 2 * 128  # layers, heads, width, K and V, bytes of bfloat16, tokens of a block


@pytest.fixture
def config(tmp_path):
    """Makes configurations; `facts` is the config.json of a checkpoint with 100 MiB of weights."""

    def make(*overrides, facts=None):
        kind = '[engine]\nkind = "emulated"\n'
        if facts is not None:
            kind = f'[model]\nname = "{tmp_path}"\n'
            (tmp_path / "config.json").write_text(json.dumps(facts))
            (tmp_path / "tokenizer.json").write_text("{}")
            with open(tmp_path / "model.safetensors", "wb") as file:
                file.truncate(100 * MIB)
        (tmp_path / "c.toml").write_text(kind + PAIR)
        return load(tmp_path / "c.toml", overrides)

    return make


@pytest.fixture
def kernel(tmp_path):
    """Makes /proc and /sys/fs/cgroup: 4 GiB available, 1 GiB of swap, and files with these contents."""

    def make(own, files=()):
        proc, groups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4194304 kB\nSwapFree: 1048576 kB\n")
        (proc / "self" / "cgroup").write_text(own)
        mounts = ((groups, "cgroup2", "rw"), (groups / "memory", "cgroup", "rw,memory"))
        lines = [f"30 22 0:9 / {path} rw - {kind} x {options}\n" for path, kind, options in mounts]
        (proc / "self" / "mountinfo").write_text("".join(lines))
        for name, text in dict(files).items():
            path = groups / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return memory.available(proc)

    return make


def group(folder, most, used, cached=0):
    stat = f"anon 7\ninactive_file {cached}\nactive_file 5"
    return {f"{folder}/memory.max": most, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def old_group(folder, most, used, cached=0):
    stat = f"cache 7\ntotal_inactive_file {cached}\ntotal_active_file 5"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"{folder}/{name}": value for name, value in zip(names, (most, used, stat), strict=True)}


def test_a_machine_without_limits(kernel):
    assert kernel("0::/\n") == (5 * GIB, "this machine")


def test_the_smallest_limit_on_the_path_counts(kernel):
    files = group("outer", 3 * GIB, 2 * GIB, GIB // 2) | group("outer/inner", 2 * GIB, 1) | group("other", 9, 9)
    left, where = kernel("0::/outer/inner\n", files)
    assert left == 3 * GIB // 2 + 5 and where.endswith("cgroup/outer")


def test_a_group_without_a_limit_and_one_that_is_over_it(kernel):
    left, where = kernel("0::/a/b\n", group("a", 100, 999) | group("a/b", "max", 5))
    assert left == 0 and where.endswith("cgroup/a")


def test_control_groups_of_version_1(kernel):
    files = old_group("memory", (1 << 63) - 4096, 8 * GIB) | old_group("memory/a", GIB, GIB // 2)
    left, where = kernel("5:cpu,cpuacct:/z\n4:memory:/a\n0::/\n", files)
    assert left == GIB // 2 + 5 and where.endswith("cgroup/memory/a")


def test_in_a_container_the_own_group_is_the_root_of_what_is_mounted(kernel):
    left, where = kernel("4:memory:/docker/123\n0::/\n", old_group("memory", GIB, 0))
    assert left == GIB + 5 and where.endswith("cgroup/memory")


def test_a_kernel_that_does_not_say(tmp_path):
    left, where = memory.available(tmp_path)
    assert left == memory.UNKNOWN and "does not say" in where


def test_this_machine_can_be_read():
    left, where = memory.available()
    assert left > 0 and where


def test_what_a_worker_of_a_model_needs(config, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: (GIB, "limit of the control group /x"))
    made = config("engine.kv_mib=1000", "transfer.slab_blocks=64", facts={**LLAMA, "dtype": "bfloat16"})
    one = memory.balance(made, "p0")
    assert one.needed // MIB == (memory.VLLM + 64 * BLOCK) // MIB + 1100 and one.available == GIB
    assert memory.balance(made).needed == memory.OTHERS + memory.GATEWAY + 2 * one.needed
    text = memory.shortage(made)
    assert "(workers: 2 of 2,080 MB), 1,024 MB are available (limit of the control group /x)" in text
    assert "lower engine.kv_mib (1000)" in text and "\n" not in text
    assert memory.shortage(made, "d0").startswith("worker d0 needs about 2,080 MB of memory, 1,024 MB are available")
    enough = memory.balance(made).needed
    monkeypatch.setattr(memory, "available", lambda: (enough, "this machine"))
    assert memory.shortage(made) is None


def test_weights_grow_with_the_numbers_that_they_are_loaded_into(config):
    made = config("model.dtype=float32", "engine.kv_mib=4000", facts={**LLAMA, "torch_dtype": "bfloat16"})
    needed = memory.balance(made, "p0").needed
    assert needed // MIB == (memory.VLLM + 64 * 2 * BLOCK) // MIB + 4000 + 200


def test_a_gpu_holds_weights_kv_and_slab(config):
    made = config("worker.p0.gpu=0", "worker.d0.gpu=1", facts=LLAMA)
    assert memory.balance(made, "p0").needed == memory.VLLM
    assert memory.shm_shortage(made, 0) is None


def test_slabs_that_do_not_fit_into_dev_shm(config):
    made = config(facts=LLAMA)
    text = memory.shm_shortage(made, 64 * MIB)
    assert "too small for the KV slabs of 2 workers: 360 MB needed, 64 MB free" in text
    assert "docker run --shm-size=425m" in text and "transfer.slab_blocks (64)" in text and "\n" not in text


def test_the_need_in_dev_shm_is_the_size_of_the_files(config, tmp_path):
    made = config("transfer.slab_blocks=40", "emulated.token_bytes=48")
    (tmp_path / "shm").mkdir()
    slab = ShmSlab("test", "p0", 40, made.engine.block_tokens * 48, directory=str(tmp_path / "shm"))
    size = os.stat(tmp_path / "shm" / slab.segment.name).st_size
    slab.close()
    assert memory.shm_shortage(made, 2 * size) is None
    assert memory.shm_shortage(made, 2 * size - 1) is not None


@pytest.mark.parametrize("facts", [{}, {"n_layer": 12}, {**LLAMA, "num_hidden_layers": None}, []])
def test_a_model_whose_block_size_only_the_engine_knows_is_not_judged(config, facts):
    made = config(facts=facts)
    assert memory.shm_shortage(made, 1) is None
    assert memory.balance(made, "p0").needed == memory.VLLM + (100 + made.engine.kv_mib) * MIB
