"""tetri-cli doctor: what is wrong on a host, and its exit status."""

import json
import os
import socket
import struct
import subprocess
import sys
import time

import pytest

from tetri import cli
from tetri.kv.shm import ShmSlab, sweep
from tetri.kv.slab import MARK

NAME = f"doctor-{os.getpid()}"

OWNER = f"""
import sys
from tetri.kv.shm import ShmSlab
slab = ShmSlab("{NAME}", "p1", 4, 100)
slab.put(3, lambda views: None, "p:r1:1")
print(slab.segment.name, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """tetri-cli doctor for a deployment of this test's own: (exit status, stdout)."""
    monkeypatch.delenv("TETRI_CONF", raising=False)

    def run_cli(*arguments):
        settings = [f"cluster.name={NAME}", f"cluster.run_dir={tmp_path}"]
        options = [part for setting in settings for part in ("--set", setting)]
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", *options, *arguments])
        out, err = capfd.readouterr()
        assert err == ""
        return ended.value.code, out

    yield run_cli
    sweep(NAME)


@pytest.fixture
def slab():
    slab = ShmSlab(NAME, "p0", 8, 1_000_000)
    yield slab
    slab.close()


@pytest.fixture
def dead():
    """The segment of an owner that was killed, and its process id."""
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        name = child.stdout.readline().strip()
        child.kill()
    return name, child.pid


def nothing(views):
    pass


def backdate(slab, handle, seconds):
    """As if these slots had been used for so long."""
    for slot in handle.slots:
        struct.pack_into("=Q", slab.segment.marks, slot * MARK.size, time.monotonic_ns() - int(seconds * 1e9))


def problems(out):
    return [line.removeprefix("PROBLEM  ") for line in out.splitlines() if line.startswith("PROBLEM")]


def test_nothing_at_all_is_healthy(run):
    assert run() == (0, "no segments\nnothing is wrong\n")


def test_a_living_worker_is_shown_with_every_slot_in_use(run, slab):
    handle, _ = slab.put(2, nothing, "p:r1:1")
    status, out = run()
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{slab.segment.name}  p0  process {os.getpid()}  alive  8.0 MB  2 of 8 slots used")
    assert {line.split()[1] for line in lines[1:3]} == {str(slot) for slot in handle.slots}
    assert all(line.endswith(" s  p:r1:1") for line in lines[1:3])
    assert lines[-1] == "nothing is wrong"


def test_in_json(run, slab, dead):
    name, pid = dead
    slab.put(1, nothing, "p:ü:1")
    status, out = run("--json")
    said = json.loads(out)
    assert status == 1 and said["deployment"] == NAME and len(said["problems"]) == 1
    found = {segment["instance"]: segment for segment in said["segments"]}
    assert found.keys() == {"p0", "p1"}
    assert (found["p0"]["alive"], found["p0"]["used"], found["p0"]["slots"]) == (True, 1, 8)
    (page,) = found["p0"]["pages"]
    assert (page["owner"], page["generation"]) == ("p:ü:1", 1) and 0 <= page["age_s"] == found["p0"]["oldest_s"]
    assert (found["p1"]["name"], found["p1"]["alive"], found["p1"]["pid"]) == (name, False, pid)


def test_the_dead_are_named_with_what_to_do_and_swept_when_told(run, slab, dead):
    name, pid = dead
    status, out = run()
    assert status == 1
    (problem,) = problems(out)
    assert problem.startswith(f"{name}: p1 (process {pid}) is dead")
    assert f"tetri-cli doctor --set cluster.name={NAME} " in problem and " --sweep removes it" in problem
    status, out = run("--sweep")
    assert (status, problems(out)) == (0, []) and f"{name}  removed" in out
    assert not os.path.exists(f"/dev/shm/{name}") and os.path.exists(f"/dev/shm/{slab.segment.name}")
    assert run()[0] == 0


def test_a_slot_that_is_used_for_long_is_a_suspected_leak(run, slab):
    old, _ = slab.put(2, nothing, "p:r1:1")
    slab.put(1, nothing, "p:r2:1")
    backdate(slab, old, 90)
    status, out = run()
    assert status == 1
    (problem,) = problems(out)
    assert "2 slots of p0" in problem and "p:r1:1" in problem and "p:r2:1" not in problem
    assert "the oldest for 90 s" in problem
    assert run("--leak-s", "100")[0] == 0
    slab.free(old)
    assert run()[0] == 0


def test_a_full_slab_shows_its_oldest_slots_or_all(run):
    slab = ShmSlab(NAME, "p0", 40, 10)
    slab.put(39, nothing, "p:r1:1")
    oldest, _ = slab.put(1, nothing, "p:r0:1")
    backdate(slab, oldest, 30)
    _, out = run()
    rows = [line for line in out.splitlines() if line.startswith("    slot")]
    assert len(rows) == 16 and "p:r0:1" in rows[0] and "and 24 more" in out
    assert run("--pages")[1].count("    slot") == 40
    slab.close()


def test_other_deployments_are_shown_when_asked_for(run, slab):
    other = ShmSlab(f"{NAME}-too", "p9", 1, 10)
    try:
        assert "p9" not in run()[1]
        found = json.loads(run("--all", "--json")[1])["segments"]
        names = {(segment["deployment"], segment["instance"]) for segment in found}
        assert {(NAME, "p0"), (f"{NAME}-too", "p9")} <= names
    finally:
        other.close()


def test_without_a_configuration_it_looks_at_what_up_started(capfd, monkeypatch, tmp_path, slab):
    monkeypatch.delenv("TETRI_CONF", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = tmp_path / "tetri"
    place.mkdir()
    workers = "".join(f'[[worker]]\niid = "{role}1"\nrole = "{role}"\n' for role in ("prefill", "decode"))
    (place / "cluster.toml").write_text(f'[cluster]\nname = "{NAME}"\nrun_dir = "{place}"\n{workers}')
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--json"])
    told = json.loads(capfd.readouterr().out)
    assert told["deployment"] == NAME and [seen["name"] for seen in told["segments"]] == [slab.segment.name]


def test_a_socket_that_nobody_listens_to_is_told(run, tmp_path):
    (tmp_path / "no-socket").touch()
    with socket.socket(socket.AF_UNIX) as listens, socket.socket(socket.AF_UNIX) as stale:
        listens.bind(str(tmp_path / "alive"))
        listens.listen()
        stale.bind(str(tmp_path / "stale"))
        stale.close()
        status, out = run()
        assert status == 1 and "sockets: 1 of 2 are listened to" in out
        (problem,) = problems(out)
        assert problem.startswith(f"{tmp_path / 'stale'}: nobody listens")
        os.unlink(tmp_path / "stale")
        assert run()[0] == 0


def test_a_segment_of_another_version_is_told(run):
    path = f"/dev/shm/tetri-{NAME}-p0-0123456789abcdef"
    with open(path, "wb") as file:
        file.write(b"tetri-kv\1\0\0\0".ljust(4096, b"\0"))
    status, out = run()
    assert status == 1 and "its owner is dead" in problems(out)[0]
    assert run("--sweep")[0] == 0 and not os.path.exists(path)
