"""tools/bench_engine: what memory and arithmetic allow, its ratios, and a run on the real model."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tetri.bench.engine_speed.__main__ import main, shown, shown_profiles, summary
from tetri.bench.engine_speed.limits import model_size

CONFIG = {
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
SHAPES = {"model.embed_tokens.weight": [100, 32], "model.layers.0.a": [32, 64], "model.norm.weight": [32]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    head = json.dumps({"__metadata__": {}, **{name: {"shape": shape} for name, shape in SHAPES.items()}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    return tmp_path


def test_a_decode_step_reads_all_weights_once_and_the_kv_of_each_request(checkpoint):
    size = model_size(checkpoint, "bfloat16")
    inside, head, kv = 32 * 64 + 32, 100 * 32, 2 * 2 * 2 * 8
    assert size.decode(3, 10) == (2 * (inside + head + 30 * kv), 3 * (2 * (inside + head) + 4 * 10 * 2 * 32))


def test_a_chunk_computes_logits_once_and_attends_to_what_came_before(checkpoint):
    size = model_size(checkpoint, "float32")
    inside, head, kv = 32 * 64 + 32, 100 * 32, 2 * 2 * 2 * 8
    read, operations = size.chunk(10)
    assert read == 4 * (inside + head + 10 * kv)
    assert operations == 2 * 10 * inside + 2 * head + 4 * (10 * 11 // 2) * 2 * 32


def test_ratios_compare_the_same_rounds():
    made = summary({"decode 1": {"vllm": [10.0, 20.0, 10.0], "engine": [9.0, 18.0, 9.0]}})["decode 1"]
    assert made["vllm"]["ms"] == 10.0 and made["engine"]["ms"] == 9.0
    assert made["engine"]["ratio"] == pytest.approx({"median": 0.9, "mean": 0.9, "low": 0.9, "high": 0.9})
    machine = {"bytes_s": 4e10, "operations_s": 5e11}
    limits = {"machine": machine, "least_ms": {"decode 1": {"memory": 7.0, "arithmetic": 0.5}}}
    lines = shown({"limits": limits, "steps": {"decode 1": made}}).splitlines()
    assert lines[0] == "memory 40.0 GB/s, arithmetic 500 GFLOP/s"
    assert lines[3].split() == ["decode", "1", "7.0", "0.5", "10.0", "9.0"]
    assert lines[6].split() == ["decode", "1", "engine", "0.900", "0.900", "0.900"]


def test_a_profile_is_a_table_of_both_sides():
    lines = shown_profiles({"decode 8": {"vllm": {"step": 2.0, "a": 1.0}, "engine": {"step": 1.0, "b": 0.5}}})
    assert [line.split() for line in lines.splitlines()[1:]] == [["step", "2.00", "1.00"], ["a", "1.00"], ["b", "0.50"]]


@pytest.mark.model
def test_all_sides_run_the_same_steps():
    small = ["--set", "engine.kv_mib=512", "--set", "engine.chunk_tokens=128", "--context", "40"]
    done = CliRunner().invoke(main, [*small, "--rounds", "2", "--no-compiled", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [*found["steps"]] == ["decode 1", "decode 8", "decode 32", "chunk 128"]
    for kind, sides in found["steps"].items():
        assert [*sides] == ["vllm", "engine", "worker"]
        least = max(found["limits"]["least_ms"][kind].values())
        assert all(side["ms"] > 0.5 * least for side in sides.values()), (kind, found)
