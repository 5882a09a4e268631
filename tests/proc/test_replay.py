"""Honesty of the simulator, 1: the event log of a live run, fed to fresh cores in another process under another
PYTHONHASHSEED, gives the same actions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live import LiveCluster, wait_until
from raw_client import RawClient
from traffic import Pressure

from tetri.proc.recorder import read, value

OVERRIDES = [
    "cluster.record=true",
    "cluster.heartbeat_s=0.1",
    "policy.length=noisy",
    "policy.length_granularity=10",
    "policy.admit=reserve_dynamic",
    "policy.order=sjf",
    "emulated.blocks=400",
    "emulated.context=6400",
    "monitor.flip=balance",
    "monitor.hold_s=0.5",
    "engine.chunk_tokens=256",
]


def replayed(folder: Path, seed: int) -> tuple[int, dict[str, Any]]:
    """In a process of its own: its exit status and what it prints."""
    command = [sys.executable, "-c", "from tetri.cli import main; main()", "sim", "replay", "--json", str(folder)]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The records of a run with more than a hundred requests, a cancel, a flip, and three kinds of processes killed."""
    costs = tmp_path_factory.mktemp("cost") / "brisk.toml"
    costs.write_text("prefill = [[1, 0.002], [256, 0.004]]\ndecode = [[1, 0.002], [32, 0.003]]\n")
    with LiveCluster(overrides=[*OVERRIDES, f"engine.cost={costs}"]) as cluster:
        pressure = Pressure(cluster, width=16, prompt=900, output=40)

        def disturb() -> None:
            pressure.more(24)
            stream = cluster.client().stream([3] * 50, max_tokens=4000)
            next(stream)
            stream.cancel()
            with RawClient(cluster.config.operators_address) as client:
                client.send("change_role", key="a", iid="p0", role="mixed")
                assert client.receive(key="a")["type"] == "role_changed"
            for victim in ("d0", "p1", "monitor"):
                cluster.kill(victim)
                cluster.start(victim)
            cluster.wait_ready("d0", "p1")
            pressure.more(60)

        assert len(pressure.run(disturb)) >= 100
        wait_until(lambda: cluster.instances()["d0"]["state"] == "ready", "d0 is not back")
        full = cluster.folder / "record" / "d9-0.events"
        with full.open("wb") as file:
            file.truncate(cluster.config.cluster.record_mib << 20)
        notes = cluster.client().status()["notes"]
        assert any(note.startswith("d9 does not record events any more") for note in notes), notes
        full.unlink()
        cluster.stop()
        yield cluster.folder


@pytest.mark.parametrize("seed", [1, 2])
def test_fresh_cores_say_the_same_under_another_hash_seed(folder: Path, seed: int) -> None:
    status, made = replayed(folder, seed)
    assert [core["difference"] for core in made["cores"] if core["difference"]] == []
    assert status == 0 and made["same"] is True
    kinds = [core["kind"] for core in made["cores"]]
    assert (kinds.count("broker"), kinds.count("monitor"), kinds.count("worker")) == (1, 2, 6)
    assert made["events"] > 5000 and made["actions"] > 5000
    heard = [pair for path in (folder / "record").glob("p0-*") for call in read(path)[1] for pair in call.event]
    lengths = [value(pair).length for pair in heard if pair[0] == "LengthKnown"]
    assert sum(length is not None for length in lengths) > 10
    print({name: made[name] for name in ("events", "ticks", "actions")})


def test_a_log_that_was_changed_is_noticed(folder: Path, tmp_path: Path) -> None:
    """One token of one prompt, in the middle of what the broker heard."""
    (path,) = (folder / "record").glob("broker-*.events")
    data = path.read_bytes()
    at = data.index(b"Submitted", len(data) // 3)
    token = data.index(b"\xa6prompt\xdc", at) + 10
    changed = bytearray(data)
    changed[token + {0xCC: 1, 0xCD: 2}.get(data[token], 0)] ^= 1  # the last byte of the first token
    (tmp_path / path.name).write_bytes(changed)
    status, made = replayed(tmp_path, 1)
    assert status == 1 and made["same"] is False
    assert "call " in made["cores"][0]["difference"] and "then Send" in made["cores"][0]["difference"]
