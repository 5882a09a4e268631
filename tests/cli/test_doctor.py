"""tetri-cli doctor: what is wrong on a host, and its exit status."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tetri.kv.shm import ShmSlab, sweep
from tetri.kv.slab import MARK

NAME = f"doctor-{os.getpid()}"
NOTHING = len  # a `write` that fills in nothing

OWNER = f"""
import sys
from tetri.kv.shm import ShmSlab
slab = ShmSlab("{NAME}", "p1", 4, 100)
slab.put(3, lambda views: None, "p:r1:1")
print(slab.segment.name, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def doctor(run, place):
    """tetri-cli doctor for a deployment of this test's own: (exit status, stdout)."""

    def doctor(*arguments):
        options = ["--set", f"cluster.name={NAME}", "--set", f"cluster.run_dir={place}"]
        status, out, err = run("doctor", *options, *arguments)
        assert err == ""
        return status, out

    yield doctor
    sweep(NAME)


@pytest.fixture
def slab():
    with closing(ShmSlab(NAME, "p0", 8, 1_000_000)) as slab:
        yield slab


@pytest.fixture
def dead():
    """The segment of an owner that was killed, and its process id."""
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        name = child.stdout.readline().strip()
        child.kill()
    return name, child.pid


def backdate(slab, handle, seconds):
    """As if these slots had been used for so long."""
    for slot in handle.slots:
        struct.pack_into("=Q", slab.segment.marks, slot * MARK.size, time.monotonic_ns() - int(seconds * 1e9))


def problems(status, out):
    found = [line.removeprefix("PROBLEM  ") for line in out.splitlines() if line.startswith("PROBLEM")]
    assert status == bool(found)
    return found


def test_nothing_at_all_is_healthy(doctor):
    assert doctor() == (0, "no segments\nnothing is wrong\n")


def test_a_run_directory_that_others_may_enter_is_not_trusted(run, place):
    (place / "cluster.toml").write_text('[cluster]\nname = "theirs"\n')
    place.chmod(0o755)
    for named in ([], ["--set", f"cluster.run_dir={place}"]):
        status, out, err = run("doctor", *named)
        assert (status, out, err) == (1, "", f"tetri-cli: {place}: other users may enter this folder: chmod 700 it\n")


def test_a_living_worker_is_shown_with_every_slot_in_use(doctor, slab):
    handle, _ = slab.put(2, NOTHING, "p:r1:1")
    status, out = doctor()
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith(f"{slab.segment.name}  p0  process {os.getpid()}  alive  8.0 MB  2 of 8 slots used")
    assert {line.split()[1] for line in lines[1:3]} == {str(slot) for slot in handle.slots}
    assert all(line.endswith(" s  p:r1:1") for line in lines[1:3])
    assert lines[-1] == "nothing is wrong"


def test_in_json(doctor, slab, dead):
    name, pid = dead
    slab.put(1, NOTHING, "p:ü:1")
    status, out = doctor("--json")
    said = json.loads(out)
    assert status == 1 and said["deployment"] == NAME and len(said["problems"]) == 1
    found = {segment["instance"]: segment for segment in said["segments"]}
    assert found.keys() == {"p0", "p1"}
    assert (found["p0"]["alive"], found["p0"]["used"], found["p0"]["slots"]) == (True, 1, 8)
    (page,) = found["p0"]["pages"]
    assert (page["owner"], page["generation"]) == ("p:ü:1", 1) and 0 <= page["age_s"] == found["p0"]["oldest_s"]
    assert (found["p1"]["name"], found["p1"]["alive"], found["p1"]["pid"]) == (name, False, pid)


def test_the_dead_are_named_with_what_to_do_and_swept_when_told(doctor, slab, dead):
    name, pid = dead
    (problem,) = problems(*doctor())
    assert problem.startswith(f"{name}: p1 (process {pid}) is dead")
    assert f"tetri-cli doctor --set cluster.name={NAME} " in problem and " --sweep removes it" in problem
    status, out = doctor("--sweep")
    assert problems(status, out) == [] and f"{name}  removed" in out
    assert not os.path.exists(f"/dev/shm/{name}") and os.path.exists(f"/dev/shm/{slab.segment.name}")
    assert doctor()[0] == 0


def test_a_segment_that_others_removed_is_told_with_what_to_do(doctor, slab):
    os.unlink(f"/dev/shm/{slab.segment.name}")
    status, out = doctor()
    (problem,) = problems(status, out)
    assert problem.startswith(f"{slab.segment.name}: was removed from /dev/shm while p0 (process {os.getpid()}) runs")
    assert "loginctl enable-linger" in problem and "RemoveIPC=no" in problem
    assert "alive  8.0 MB  0 of 8 slots used" in out
    assert [segment["unlinked"] for segment in json.loads(doctor("--json")[1])["segments"]] == [True]


def test_a_slot_that_is_used_for_long_is_a_suspected_leak(doctor, slab):
    old, _ = slab.put(2, NOTHING, "p:r1:1")
    slab.put(1, NOTHING, "p:r2:1")
    backdate(slab, old, 90)
    (problem,) = problems(*doctor())
    assert "2 slots of p0" in problem and "p:r1:1" in problem and "p:r2:1" not in problem
    assert "the oldest for 90 s" in problem
    assert doctor("--leak-s", "100")[0] == 0
    slab.free(old)
    assert doctor()[0] == 0


def test_a_full_slab_shows_its_oldest_slots_or_all(doctor):
    with closing(ShmSlab(NAME, "p0", 40, 10)) as slab:
        slab.put(39, NOTHING, "p:r1:1")
        oldest, _ = slab.put(1, NOTHING, "p:r0:1")
        backdate(slab, oldest, 30)
        _, out = doctor()
        rows = [line for line in out.splitlines() if line.startswith("    slot")]
        assert len(rows) == 16 and "p:r0:1" in rows[0] and "and 24 more" in out
        assert doctor("--pages")[1].count("    slot") == 40


def test_other_deployments_are_shown_when_asked_for(doctor, slab):
    with closing(ShmSlab(f"{NAME}-too", "p9", 1, 10)):
        assert "p9" not in doctor()[1]
        found = json.loads(doctor("--all", "--json")[1])["segments"]
    names = {(segment["deployment"], segment["instance"]) for segment in found}
    assert {(NAME, "p0"), (f"{NAME}-too", "p9")} <= names


def test_without_a_configuration_it_looks_at_what_up_started(run, place, slab):
    workers = "".join(f'[[worker]]\niid = "{role}1"\nrole = "{role}"\n' for role in ("prefill", "decode"))
    (place / "cluster.toml").write_text(f'[cluster]\nname = "{NAME}"\nrun_dir = "{place}"\n{workers}')
    told = json.loads(run("doctor", "--json")[1])
    assert told["deployment"] == NAME and [seen["name"] for seen in told["segments"]] == [slab.segment.name]


def test_a_socket_that_nobody_listens_to_is_told(doctor, place):
    (place / "no-socket").touch()
    with socket.socket(socket.AF_UNIX) as listens, socket.socket(socket.AF_UNIX) as stale:
        listens.bind(str(place / "alive"))
        listens.listen()
        stale.bind(str(place / "stale"))
        stale.close()
        status, out = doctor()
        assert "sockets: 1 of 2 are listened to" in out
        (problem,) = problems(status, out)
        assert problem.startswith(f"{place / 'stale'}: nobody listens")
        os.unlink(place / "stale")
        assert doctor()[0] == 0


def test_a_segment_of_another_version_is_told(doctor):
    path = Path(f"/dev/shm/tetri-{NAME}-p0-0123456789abcdef")
    path.write_bytes(b"tetri-kv\1\0\0\0".ljust(4096, b"\0"))
    (problem,) = problems(*doctor())
    assert "its owner is dead" in problem
    assert doctor("--sweep")[0] == 0 and not path.exists()
