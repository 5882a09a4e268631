"""up and down for real, on the emulated engine and under supervisord."""

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import live
import pytest

from tetri.client import Client, Operator, Unreachable
from tetri.client.place import address_in
from tetri.config import load
from tetri.kv.shm import sweep
from tetri.models import ModelError
from tetri.net.lock import hold
from tetri.proc import gateways, launch, memory
from tetri.proc.run_directory import CHECK_S
from tetri.proc.supervise import LaunchError, Program, Supervisor, check_run_dir
from tetri.strict import ConfigError

LONGEST = 83  # bytes of a run directory whose sockets can be made
PAIR = '[[worker]]\niid = "p0"\nrole = "prefill"\n[[worker]]\niid = "d0"\nrole = "decode"\n'


@pytest.fixture
def deployment():
    """Makes configurations of small deployments; whatever a test leaves running is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="tetri-", dir="/tmp"))  # pytest's own paths may be too long
    run_dir = folder / "a b".ljust(LONGEST - len(f"{folder}/"), "x")
    name = f"t{os.getpid()}-{os.urandom(3).hex()}"

    def make(*overrides, text='[engine]\nkind = "emulated"\n'):
        (folder / "c.toml").write_text(text + PAIR)
        own = [f"cluster.run_dir={run_dir}", f"cluster.name={name}", "gateway.count=0"]
        return load(folder / "c.toml", [*own, *overrides])

    yield make
    Supervisor(run_dir).stop()
    sweep(name)
    shutil.rmtree(folder)


GIVEN_UP_S = 30.0


def up(config, said=None, wait_s=GIVEN_UP_S):
    return launch.up(config, (said if said is not None else []).append, wait_s)


def nothing_left(run_dir, name):
    assert Supervisor(run_dir).started() == [] and Supervisor(run_dir).pid() is None
    assert [path.name for path in run_dir.glob("*") if path.is_socket()] == []
    assert not {"cluster.json", "kv.key"} & {path.name for path in run_dir.glob("*")}
    assert [segment for segment in os.listdir("/dev/shm") if f"-{name}-" in segment] == []


def test_up_serves_and_down_leaves_nothing(deployment):
    config, said = deployment("cluster.heartbeat_s=0.1", "gateway.count=1", "gateway.port=0"), []
    began = time.monotonic()
    run_dir = up(config, said)
    assert time.monotonic() - began < GIVEN_UP_S
    ready = {"p0 (prefill)", "d0 (decode)", "monitor (the loads of all)", "gateway (HTTP)"}
    assert {f"{each} is ready" for each in ready} < set(said)
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert load(run_dir / "cluster.toml") == replace(config, cluster=replace(config.cluster, key=f"{run_dir}/kv.key"))
    state = json.loads((run_dir / "cluster.json").read_text())
    assert set(state["pids"]) == {"supervisord", "broker", "gateway", "monitor", "p0", "d0"}
    with urllib.request.urlopen(gateways.urls(run_dir)["gateway"] + "/v1/models", timeout=10) as answer:
        assert b'"id":"emulated"' in answer.read()
    with Client(address_in(run_dir), timeout=10) as client:
        assert len(client.generate("hello", max_tokens=3).token_ids) == 3
    with Operator(address_in(run_dir, "operators"), timeout=10) as operator:
        assert operator.flip("d0", "mixed")["was"] == "decode"
    with pytest.raises(LaunchError, match=rf"already up \(pid {state['pids']['supervisord']}\), run tetri-cli down"):
        up(config)
    assert launch.down(run_dir) is True
    nothing_left(run_dir, config.cluster.name)
    assert gateways.urls(run_dir) == {} and "Traceback" not in (run_dir / "log" / "gateway.log").read_text()
    assert launch.down(run_dir) is False
    with pytest.raises(Unreachable, match="nothing is up"):
        address_in(run_dir)


def test_a_removed_run_directory_and_a_killed_worker_come_back(deployment):
    config = deployment()
    run_dir = up(config)
    pids = json.loads((run_dir / "cluster.json").read_text())["pids"]
    with Client(address_in(run_dir), timeout=10) as early:
        remove(run_dir)
        live.wait_until(lambda: found(run_dir), "clients find nothing")
        comes_back(run_dir, pids["d0"])
        assert early.generate("hello", max_tokens=3).receipt.decode_instance == "d0"
    assert load(run_dir / "cluster.toml") == replace(config, cluster=replace(config.cluster, key=f"{run_dir}/kv.key"))
    assert "ready to serve" in (run_dir / "log" / "d0.log").read_text()
    with pytest.raises(LaunchError, match=r"already up \(pid \d+\), run tetri-cli down first"):
        up(config)
    assert launch.down(run_dir)
    nothing_left(run_dir, config.cluster.name)


def remove(run_dir):
    """Remove the run directory. Again, if no process had looked into it since `up` wrote its last file."""
    state = run_dir / "cluster.json"
    text = state.read_text()

    def written_again():
        if not state.exists():
            state.parent.mkdir(exist_ok=True)
            state.write_text(text)
        time.sleep(1.5 * CHECK_S)
        run_dir.rename(run_dir.with_name("removed"))
        shutil.rmtree(run_dir.with_name("removed"))
        time.sleep(1.5 * CHECK_S)
        return state.exists()

    live.wait_until(written_again, "nobody writes it")
    assert state.read_text() == text


def found(run_dir):
    """Whether a client that comes now is answered."""
    try:
        with Client(address_in(run_dir), timeout=0.5) as client:
            return client.status() is not None
    except Unreachable:
        return False


def comes_back(run_dir, pid):
    """Kill d0, and wait until another incarnation has taken its place and serves."""
    with Client(address_in(run_dir), timeout=10) as client:

        def incarnation():
            return {i["iid"]: i["incarnation"] for i in client.status()["instances"] if i["state"] == "ready"}.get("d0")

        first = incarnation()
        os.kill(pid, signal.SIGKILL)
        live.wait_until(lambda: incarnation() not in (first, None), "d0 did not rejoin")
        assert client.generate("hello", max_tokens=3).receipt.decode_instance == "d0"


def test_down_finds_the_processes_of_a_killed_supervisord(deployment):
    config = deployment()
    run_dir = up(config)
    os.kill(Supervisor(run_dir).pid(), signal.SIGKILL)
    live.wait_until(lambda: Supervisor(run_dir).pid() is None, "supervisord lives")
    assert len(Supervisor(run_dir).started()) == 5  # the broker has a child that tokenises
    with pytest.raises(LaunchError, match="already up"):
        up(config)
    assert launch.down(run_dir) is True
    nothing_left(run_dir, config.cluster.name)


def test_down_ends_a_supervisord_that_nothing_leads_to(deployment):
    """The run directory was removed: it would start its programs again and again."""
    config = deployment()
    run_dir = up(config)
    [chief] = Supervisor(run_dir).chiefs()
    run_dir.rename(run_dir.with_name("removed"))
    with pytest.raises(LaunchError, match=rf"already up \(pid {chief}\)"):
        up(config)
    run_dir.rename(run_dir.with_name("removed too"))
    assert launch.down(run_dir) is True
    assert Supervisor(run_dir).alive() == []
    nothing_left(run_dir, config.cluster.name)
    assert found(up(config))
    assert launch.down(run_dir) is True


def test_down_ends_a_supervisord_that_hangs(deployment, monkeypatch):
    config = deployment()
    run_dir = up(config)
    monkeypatch.setattr("tetri.proc.supervise.RPC_S", 0.3)
    monkeypatch.setattr("tetri.proc.supervise.STOP_S", 2)
    os.kill(Supervisor(run_dir).pid(), signal.SIGSTOP)
    assert launch.down(run_dir) is True
    assert Supervisor(run_dir).alive() == []
    nothing_left(run_dir, config.cluster.name)


@pytest.mark.parametrize("text", ["[clus", '[cluster]\nname = "{name}"\nother = 1\n'])
def test_down_without_a_configuration_that_loads(deployment, text):
    config = deployment()
    run_dir = up(config)
    os.kill(json.loads((run_dir / "cluster.json").read_text())["pids"]["d0"], signal.SIGKILL)
    (run_dir / "cluster.toml").write_text(text.format(name=config.cluster.name))
    assert launch.down(run_dir) is True
    assert Supervisor(run_dir).alive() == []
    if "name" in text:
        nothing_left(run_dir, config.cluster.name)


def test_down_leaves_the_socket_of_a_program_that_was_started_by_hand(deployment):
    config, said = deployment(), []
    config.run_dir.mkdir()
    for name in ("inbox-d7", "inbox-d8"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(config.run_dir / name))
    (config.run_dir / "inbox-d7").unlink()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(config.run_dir / "inbox-d7"))
        alive.listen()
        assert launch.down(config.run_dir, said.append) is False
    assert [path.name for path in config.run_dir.iterdir() if path.is_socket()] == ["inbox-d7"]
    assert len(said) == 1 and "inbox-d7 is still in use" in said[0]


def test_a_wrong_setting_of_one_worker_stops_everything_at_once(deployment):
    config = deployment("worker.p0.gpu=63")
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"p0 does not start: tetri-worker: "):
        up(config)
    assert time.monotonic() - began < GIVEN_UP_S
    nothing_left(config.run_dir, config.cluster.name)


def programs(monkeypatch, **shell):
    """Replace what is run by shell scripts."""
    scripts = {name: ["/bin/sh", "-c", script] for name, script in shell.items()}
    monkeypatch.setattr(launch, "commands", lambda config, conf: scripts)


def test_a_crash_loop_is_noticed_and_its_last_words_told(deployment, monkeypatch):
    programs(monkeypatch, broker="sleep 60", p0="echo first; echo 'boom 100%'; exit 1", d0="sleep 60")
    config = deployment()
    log = config.run_dir / "log" / "p0.log"
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier run\n")
    began = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        up(config)
    assert log.read_text().startswith("of an earlier run\n") and "an earlier run" not in str(caught.value)
    first, *more = str(caught.value).splitlines()
    assert first == "p0 does not start: boom 100%" and more[0].strip() == "first"
    assert more[-1].strip() == f"log: {log}"
    assert time.monotonic() - began < GIVEN_UP_S
    nothing_left(config.run_dir, config.cluster.name)


def test_shortages_are_told_at_the_start_and_with_what_the_kernel_kills(deployment, monkeypatch):
    programs(monkeypatch, broker="sleep 60", p0="echo loading; kill -9 $$", d0="sleep 60")
    monkeypatch.setattr(memory, "available", lambda: (100 << 20, "limit of the control group /x"))
    monkeypatch.setattr(memory, "free_bytes", lambda directory: 1000)
    config, said = deployment(), []
    with pytest.raises(LaunchError) as caught:
        up(config, said)
    needed = "the programs need about 443 MB of memory (workers: 2 of 97 MB), 100 MB are available"
    first, *more = str(caught.value).splitlines()
    assert first.startswith("p0 does not start: killed by signal 9 (SIGKILL), as the kernel does when memory runs out")
    assert needed in first and more[0].strip() == "loading"
    small = "/dev/shm is too small for the KV slabs of 2 workers: 1 MB needed, 0 MB free"
    for short in (f"{needed} (limit of the control group /x): configure fewer workers", small):
        assert any(text.startswith(f"warning: {short}") for text in said), said
    nothing_left(config.run_dir, config.cluster.name)


@pytest.mark.parametrize(
    ("logged", "output", "reason"),
    [
        ("terminated by SIGSEGV (core dumped); not expected", "loading", "killed by signal 11 (SIGSEGV)"),
        ("terminated by signal 64; not expected", "loading", "killed by signal 64"),
        ("exit status 7; not expected", "", "exit status 7, no output"),
        ("exit status 7; not expected", "boom", "boom"),
    ],
)
def test_each_end_has_a_reason(tmp_path, monkeypatch, logged, output, reason):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "p0.log").write_text(f"{output}\n")
    reasons = ("p0 (exit status 1; not expected)", f"p0 ({logged})", "d0 (exit status 3; not expected)")
    ends = "".join(f" WARN exited: {each}\n" for each in reasons)
    (tmp_path / "log" / "supervisord.log").write_text(ends)
    watch = launch._Watch(Supervisor(tmp_path), "5 MB are available")
    with pytest.raises(LaunchError) as caught:
        for started in (1, 2):
            monkeypatch.setattr(Supervisor, "programs", lambda own, at=started: [Program("p0", "BACKOFF", 0, at, 0)])
            watch.look()
    assert str(caught.value).splitlines()[0] == f"p0 does not start: {reason}"


def test_what_is_never_ready_is_named_and_killed_if_it_ignores_the_signal(deployment, monkeypatch):
    monkeypatch.setattr("tetri.proc.supervise.STOP_S", 1)
    programs(monkeypatch, broker="trap '' TERM; while :; do sleep 0.1; done", p0="sleep 60", d0="sleep 60")
    config = deployment()
    with pytest.raises(LaunchError, match="not ready in time: p0, d0, monitor; logs are in"):
        up(config, wait_s=0.5)
    nothing_left(config.run_dir, config.cluster.name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_up_stops_what_it_started(deployment, monkeypatch, number):
    config, said, stop = deployment(), [], Supervisor.stop

    def interrupted_stop(supervisor):  # a second signal changes nothing
        signal.raise_signal(number)
        stop(supervisor)

    def say(text):
        said.append(text)
        if text.startswith("started"):
            signal.raise_signal(number)

    monkeypatch.setattr(Supervisor, "stop", interrupted_stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        interrupt(config, say)
    finally:
        signal.signal(signal.SIGINT, before)
        monkeypatch.undo()
    assert signal.getsignal(signal.SIGHUP) is not signal.default_int_handler
    assert said[-1] == "stopping"
    nothing_left(config.run_dir, config.cluster.name)


def test_a_signal_after_all_is_ready_is_not_lost(deployment):
    config, ready = deployment(), []

    def say(text):
        if text.endswith("is ready"):
            ready.append(text)
            if len(ready) == 3:  # p0, d0 and the monitor: nothing is waited for any more
                signal.raise_signal(signal.SIGTERM)

    interrupt(config, say)
    assert len(ready) == 3
    nothing_left(config.run_dir, config.cluster.name)


def test_nor_is_one_just_before_the_return(deployment, monkeypatch):
    config, start = deployment(), launch.start

    def signalled(*given):
        run_dir = start(*given)
        signal.raise_signal(signal.SIGTERM)
        return run_dir

    monkeypatch.setattr(launch, "start", signalled)
    interrupt(config, lambda text: None)
    nothing_left(config.run_dir, config.cluster.name)


def interrupt(config, say):
    with pytest.raises(KeyboardInterrupt):
        launch.up(config, say, 30)


def test_two_at_once_exclude_each_other(deployment):
    config = deployment()
    config.run_dir.mkdir()
    with hold(config.run_dir / "up.lock"):
        for act in (lambda: up(config), lambda: launch.down(config.run_dir)):
            with pytest.raises(LaunchError, match=f"another tetri-cli .* process {os.getpid()}"):
                act()


def test_a_port_in_use(deployment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=r"in use.*choose another port"):
            up(deployment(f"broker.clients=tcp://127.0.0.1:{port}"))
        with pytest.raises(LaunchError, match=rf"tcp://127.0.0.1:{port} cannot be used .*broker.metrics_port=PORT"):
            up(deployment(f"broker.metrics_port={port}"))


def test_a_port_of_a_gateway_in_use(deployment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"http://127.0.0.1:{port} cannot be used .*: choose another with --set"):
            up(deployment("gateway.count=1", f"gateway.port={port}"))


def test_what_can_be_said_before_anything_starts(deployment):
    with pytest.raises(ConfigError, match="transfer.transport: must be one of: auto, cuda_ipc"):
        up(deployment("transfer.transport=local"))
    with pytest.raises(ModelError, match="unknown model"):
        up(deployment("model.name=/nowhere", text=""))
    assert not deployment().run_dir.exists()


def test_run_directories_that_cannot_be(deployment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="cannot be the run directory"):
        up(deployment(f"cluster.run_dir={tmp_path}/file/x"))
    with pytest.raises(LaunchError, match="set another"):
        up(deployment("cluster.run_dir=/tmp/tetri-;x"))
    assert not Path("/tmp/tetri-;x").exists()
    with pytest.raises(LaunchError, match="broker.clients: .* at most 102 fit"):
        up(deployment(f"broker.clients=ipc:///{'x' * 102}"))
    loose = deployment().run_dir
    loose.mkdir(mode=0o755)
    assert stat.S_IMODE(launch._private(loose).stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(loose)
    for act in (up, lambda config: launch.down(config.run_dir)):
        with pytest.raises(LaunchError, match="link: is a link: name the folder itself"):
            act(deployment(f"cluster.run_dir={tmp_path}/link"))


def test_another_users_run_directory_is_left_alone(deployment, monkeypatch):
    config, owner = deployment(), os.geteuid()
    config.run_dir.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    for act in (up, lambda config: launch.down(config.run_dir)):
        with pytest.raises(LaunchError, match=r"belongs to another user \(uid \d+\): set cluster\.run_dir"):
            act(config)
    assert os.listdir(config.run_dir) == []


def test_a_relative_model_folder_becomes_absolute(deployment, tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert launch._checked(deployment("model.name=.", text="")).model.name == str(tmp_path.resolve())


def test_a_missing_program(deployment, monkeypatch, tmp_path):
    config = deployment()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError, match=r"tetri-broker is missing: run bin/setup"):
        up(config)
    nothing_left(config.run_dir, config.cluster.name)


def test_a_supervisord_that_does_not_start(deployment, monkeypatch):
    config = deployment()
    failed = subprocess.CompletedProcess([], 2, "Error: something\nFor help, ...\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(LaunchError, match="supervisord does not start: Error: something"):
        up(config)


def test_a_supervisord_that_cannot_make_its_socket(deployment, monkeypatch):
    """It tries again and again, and says nothing in its log."""
    monkeypatch.setattr("tetri.proc.supervise.START_S", 1)
    config = deployment()
    config.run_dir.mkdir()
    in_the_way = Supervisor(config.run_dir).socket
    in_the_way.mkdir()
    with pytest.raises(LaunchError, match="supervisord does not start within 1 s: "):
        up(config)
    in_the_way.rmdir()
    nothing_left(config.run_dir, config.cluster.name)


def test_a_file_system_without_hard_links(deployment, monkeypatch):
    def link(*paths):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    config, said = deployment(), []
    with pytest.raises(LaunchError, match=r"hard-linked in .* \(Operation not permitted\): set a cluster.run"):
        up(config, said)
    assert said == [] and [path.name for path in config.run_dir.iterdir()] == ["up.lock"]


@pytest.mark.parametrize(("iid", "longest"), [("p1", LONGEST), ("p" * 16, 79)])
def test_a_run_directory_is_refused_exactly_when_a_path_in_it_is_too_long(deployment, iid, longest):
    folder = deployment().run_dir.parent
    names = (f"inbox-{iid}.next", "supervisor.sock.4194304")
    for size in range(longest - 3, longest + 4):
        run_dir = folder / ("ä" + "x" * (size - len(f"{folder}/") - 2))
        config = deployment(f"cluster.run_dir={run_dir}", text=f'[[worker]]\niid = "{iid}"\nrole = "prefill"\n')
        run_dir.mkdir()
        can = all(bound(f"{run_dir}/{name}") for name in names)
        assert can is (size <= longest)
        if can:
            check_run_dir(config)
        else:
            with pytest.raises(LaunchError, match=f"run_dir: .* has {size} bytes, at most {longest} fit"):
                check_run_dir(config)


def bound(path):
    with socket.socket(socket.AF_UNIX) as made:
        try:
            made.bind(path)
        except OSError:
            return False
        return True


def test_logs_of_earlier_runs_stay_and_are_bounded(tmp_path):
    supervisor = Supervisor(tmp_path)
    log = supervisor.log("p0")
    for run in range(2):
        supervisor.write({"p0": ["true"]})
        assert supervisor.output("p0") == []
        with log.open("a") as file:
            file.write(f"in run {run}")  # died within the line
        assert supervisor.output("p0") == [f"in run {run}"]
    assert "in run 0" in log.read_text()
    for number in range(40):
        old = supervisor.log(f"w{number}").with_suffix(".log.1" if number % 2 else ".log")
        old.write_text("")
        os.utime(old, (number, number))
    log.with_suffix(".log.1").write_text("")
    os.utime(log, (0, 0))
    supervisor.write({"p0": ["true"]})
    kept = {path.name for path in log.parent.iterdir()}
    assert kept - {"p0.log", "p0.log.1", "supervisord.log"} == {
        f"w{number}.log{'.1' * (number % 2)}" for number in range(24, 40)
    }
    assert len(kept) == 16 + 3
    log.write_text("after a rotation\n")
    assert supervisor.output("p0") == ["after a rotation"] and supervisor.output("d0") == []


def test_kv_over_tcp_has_a_key_of_its_own_at_each_start(deployment):
    config = deployment("transfer.transport=stream")
    run_dir, key = up(config), config.run_dir / "kv.key"
    first = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with Client(address_in(run_dir), timeout=10) as client:
        assert client.generate("hello", max_tokens=3).receipt.transport == "stream"
    assert launch.down(run_dir) and not key.exists()
    key.write_text("left by a deployment that was not stopped\n")
    written = load(run_dir / "cluster.toml")
    named = launch._with_key(written, key)
    assert named == written and key.read_bytes() not in (b"", first)
    other = replace(config, cluster=replace(config.cluster, key="/a/file"))
    assert launch._with_key(other, key) == other and not key.exists()
