"""What tools/bench_transfer measures: its arithmetic, its two processes, and the program."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tetri.bench.transfer import __main__ as program
from tetri.bench.transfer import measure as transfer
from tetri.bench.transfer.measure import Case, Memory, alternated, row
from tetri.kv.base import KVError

PROGRAM = Path(__file__).parent.parent.parent / "tools" / "bench_transfer"
SMALL = Case("shm", blocks=3, block_bytes=10_000, memory=400_000, depth=2)


def left_of(pid):
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"tetri-bench{pid}-")]


def test_a_row_compares_medians_of_the_same_rounds():
    case = Case("shm", blocks=4, block_bytes=1_000_000, memory=1 << 30)
    found = row(case, 10, {"path": 0.02, "without": 0.016, "memcpy": 0.008, "with_put": 0.04, "bare": 0.025})
    assert found == {
        "transport": "shm",
        "chunk_mb": 4.0,
        "gbps": 2.0,
        "memcpy_gbps": 5.0,
        "ratio": 0.4,
        "digest_percent": 25.0,
        "gbps_with_put": 1.0,
        "bare_gbps": 1.6,
        "bare_ratio": 1.25,
    }


def test_the_rounds_alternate_and_the_first_does_not_count():
    said, order = iter(range(100)), []

    def run(name):
        def fetching(count):
            order.append((name, count))
            return next(said)

        return fetching

    seconds = alternated({"a": run("a"), "b": run("b")}, 7, 2)
    assert order == [("a", 7), ("b", 7)] * 3
    assert seconds == {"a": [2, 4], "b": [3, 5]}


def test_the_memory_is_given_out_in_turn_and_every_page_of_it_is_its_own():
    memory = Memory(SMALL)
    places = [memory.next() for _ in range(SMALL.places + 1)]
    assert len(places) == 400_000 // 30_000 + 1
    places[0][:] = b"x" * SMALL.chunk_bytes
    assert bytes(places[-1]) == bytes(places[0]) and b"x" * 100 not in bytes(places[1])


def test_chunks_really_go_to_another_process():
    with transfer.senders(SMALL, [True, False]) as made:
        for sender in made:
            assert sender.run(20) > 0
            assert not sender._sent
        assert next(made[0]._numbers) == SMALL.places + 20
    assert left_of(os.getpid()) == []


def test_chunks_that_lie_in_the_slab_go_again_each_in_its_turn():
    with transfer.senders(Case("stream", 3, 10_000, 400_000, 2), [True]) as (sender,):
        ready = list(sender._landed)
        assert len(ready) == sender._case.places
        said = announced(sender)
        assert sender.again(2 * len(ready)) > 0
        assert said == ready * 2 and list(sender._landed) == ready
        assert sender.run(3) > 0 and len({handle.slots[0] for handle, _ in sender._landed}) == len(ready)


def announced(sender):
    said, announce = [], sender._announce
    sender._announce = lambda *chunk: (said.append(chunk), announce(*chunk))
    return said


def test_the_two_processes_are_on_two_cores_each_time():
    before = os.sched_getaffinity(0)
    for _ in range(2):
        with transfer.senders(SMALL, [True]):
            (child,) = multiprocessing.active_children()
            cores = [os.sched_getaffinity(pid) for pid in (0, child.pid)]
            assert [len(found) for found in cores] == [1, 1]
            assert cores[0] != cores[1] or len(before) == 1
        assert os.sched_getaffinity(0) == before


def test_what_the_receiver_cannot_take_ends_the_measurement(monkeypatch):
    with transfer.senders(SMALL, [True]) as (sender,):
        put = sender.store.put
        monkeypatch.setattr(sender.store, "put", lambda *arguments: (put(*arguments)[0], 12345))
        with pytest.raises(KVError, match="digest"):
            sender.run(1)
    assert left_of(os.getpid()) == []


def test_the_program_says_it_in_json_and_leaves_nothing():
    command = [PROGRAM, "--transport", "shm", "--sizes", "0.1,0.4", "--block-tokens", "2", "--memory-mb", "2"]
    command += ["--rounds", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    said = json.loads(output)
    assert [found["chunk_mb"] for found in said["rows"]] == [0.09, 0.41]
    for found in said["rows"]:
        assert {"transport", "chunk_mb", "gbps", "memcpy_gbps", "ratio", "digest_percent"} == found.keys()
        assert found["gbps"] > 0 and found["transport"] == "shm"
    (found,) = said["alone"]
    assert found["ratio"] == pytest.approx(found["ms"] / found["memcpy_ms"], rel=0.02)
    assert found["chunk_mb"] == pytest.approx(12, abs=0.05)
    assert left_of(process.pid) == [] and said["left_out"] == {}


@pytest.mark.parametrize(("lacks", "measured"), [(False, ["shm", "nixl", "stream"]), (True, ["shm", "stream"])])
def test_by_default_it_measures_each_path_that_the_machine_has(monkeypatch, lacks, measured):
    def lacking():
        if lacks:
            raise KVError("there is none")

    monkeypatch.setattr("tetri.kv.cuda.runtime.load", lacking)
    monkeypatch.setattr("tetri.kv.nixl.agent.library", lacking)
    monkeypatch.setattr(program, "end_by_signal", lambda: None)
    monkeypatch.setattr(program, "measure", lambda case, *_: {"transport": case.transport, "chunk_mb": case.blocks})
    monkeypatch.setattr(program, "alone", lambda case, _: {"transport": case.transport})
    found = json.loads(CliRunner().invoke(program.main, ["--sizes", "3", "--json"]).stdout)
    assert [row["transport"] for row in found["rows"]] == [row["transport"] for row in found["alone"]] == measured
    none = {"cuda_ipc": "there is none", "nixl": "there is none"}
    assert found["left_out"] == (none if lacks else {"cuda_ipc": "tools/gpu_check measures it"})
    text = CliRunner().invoke(program.main, ["--sizes", "3,12"]).stdout.splitlines()
    rows = text[1 : 2 * len(measured) + 1]
    assert [row.split() for row in rows] == [[name, blocks] for blocks in ("1", "4") for name in measured]
    assert [line for line in text if line.startswith("left out: ")] == [
        f"left out: {name}: {why}" for name, why in found["left_out"].items()
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_a_signal_to_all_of_it_the_program_leaves_nothing(number):
    """As timeout ends it, which signals the program twice: itself, and with its group."""
    command = [PROGRAM, "--transport", "shm", "--sizes", "3", "--rounds", "1000000", "--memory-mb", "16"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        until = time.monotonic() + 60
        while len(left_of(process.pid)) < 3 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert len(left_of(process.pid)) == 3  # two senders' slabs and the receiver's
        process.send_signal(number)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    until = time.monotonic() + 10
    while left_of(process.pid) and time.monotonic() < until:  # the receiver may be a moment behind
        time.sleep(0.01)
    assert not left_of(process.pid)
