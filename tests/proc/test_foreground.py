"""tetri-cli up --foreground as a program: what a container or systemd does to it, and what it sees."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import live
import pytest

from tetri.config import load
from tetri.kv.shm import sweep
from tetri.proc import foreground, launch
from tetri.proc.supervise import Supervisor

PAIR = '[engine]\nkind = "emulated"\n' + "".join(
    f'[[worker]]\niid = "{iid}"\nrole = "{role}"\n' for iid, role in (("p0", "prefill"), ("d0", "decode"))
)
# The deployment's program is a shell. Unless `wait` is "ready", it counts as ready at once.
SHELLS = """
import sys
from tetri import cli
from tetri.proc import foreground, launch
launch.commands = foreground.commands = lambda config, conf: {{"p0": ["/bin/sh", "-c", {script!r}]}}
ready = launch._wait_ready
launch._wait_ready = {wait}
cli.main(sys.argv[1:])
"""


class Foreground:
    """A running `tetri-cli up --foreground`, with its output in files."""

    def __init__(self, folder, name, *start, **options):
        (folder / "c.toml").write_text(PAIR)
        overrides = (f"cluster.run_dir={folder / 'run'}", f"cluster.name={name}", "gateway.count=0")
        self.config, self.folder = load(folder / "c.toml", overrides), folder
        settings = [part for each in overrides for part in ("--set", each)]
        command = [sys.executable, *start, "up", "--foreground", "--conf", folder / "c.toml", *settings]
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **options)

    def err(self):
        return (self.folder / "err").read_text()

    def out(self):
        return (self.folder / "out").read_text()

    def wait_err(self, text):
        def there():
            assert self.program.poll() is None or text in self.err(), self.err()
            return text in self.err()

        live.wait_until(there, f"no {text!r}", 60)

    def ended(self):
        """Its exit status; nothing may be left."""
        status = self.program.wait(60)
        run_dir = self.config.run_dir
        assert Supervisor(run_dir).alive() == []
        assert [path.name for path in run_dir.iterdir() if path.is_socket()] == []
        assert not (run_dir / "cluster.json").exists()
        assert [name for name in os.listdir("/dev/shm") if f"-{self.config.cluster.name}-" in name] == []
        return status


@pytest.fixture
def folder():
    found = Path(tempfile.mkdtemp(prefix="tetri-", dir="/tmp"))  # pytest's own paths may be too long
    yield found
    shutil.rmtree(found)


@pytest.fixture
def start(folder):
    """Starts a deployment in the foreground: of shells that run `script`, or else a real one."""
    name, started = f"t{os.getpid()}-{os.urandom(3).hex()}", []

    def begin(script=None, wait="lambda *given: None", **options):
        program = [str(Path(sys.executable).parent / "tetri-cli")]
        program = ["-c", SHELLS.format(script=script, wait=wait)] if script else program
        started.append(Foreground(folder, name, *program, **options))
        return started[0]

    yield begin
    for each in started:
        each.program.kill()
        each.program.wait()
        Supervisor(each.config.run_dir).stop()
    sweep(name)


def children(pid):
    """The states of a process's children, by pid."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = stat.read_text().partition(" (")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent, *_ = rest.rpartition(") ")[2].split()
        if int(parent) == pid:
            found[int(number)] = state
    return found


def test_it_serves_prints_logs_tells_systemd_and_stops_on_sigterm(start, folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{folder}")
        running = start(env={**os.environ, "NOTIFY_SOCKET": f"@{folder}"})
        systemd.settimeout(60)
        assert systemd.recv(100) == b"READY=1"
        assert "up: an emulated model on 1 prefill and 1 decode workers" in running.err()
        with live.Client(running.config.clients_address, timeout=20) as client:
            assert len(client.generate("hello", max_tokens=3).token_ids) == 3
        running.program.send_signal(signal.SIGTERM)
        assert systemd.recv(100) == b"STOPPING=1"
        assert running.ended() == 0
    lines = running.out().splitlines()
    for program, text in (("p0          |", "ready to serve"), ("supervisord |", "stopped: p0")):
        assert any(line.startswith(program) and text in line for line in lines), lines
    assert running.err().endswith("stopping\n")


def test_orphans_are_reaped_and_a_second_signal_changes_nothing(start, folder):
    (folder / "run" / "log").mkdir(parents=True)
    (folder / "run" / "log" / "p0.log").write_text("an earlier run\n")
    running = start(f"(sh -c 'sleep 0.2; echo done; : >{folder}/done' &); exec sleep 60")
    running.wait_err("up:")
    live.wait_until((folder / "done").exists, "the orphan did not end")
    live.wait_until(lambda: "Z" not in children(running.program.pid).values(), "a zombie is left")
    assert len(children(running.program.pid)) == 1  # supervisord
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        running.program.send_signal(number)
    assert running.ended() == 0 and "p0          | done" in running.out()
    assert "an earlier run" not in running.out()


def test_a_signal_during_the_start_is_a_clean_stop(start):
    running = start("exec sleep 60", wait="ready")
    running.wait_err("started the broker")
    running.program.send_signal(signal.SIGTERM)
    assert running.ended() == 0


def test_only_down_from_elsewhere_ends_it(start):
    running = start("exec sleep 60")
    running.wait_err("up:")
    run_dir = running.config.run_dir
    pid = Supervisor(run_dir).pid()
    with pytest.raises(launch.LaunchError, match="already up"):
        launch.up(running.config, lambda text: None, 1)
    launch.clean_up(run_dir, pid + 1, lambda text: None)  # as another deployment would, which ran here before
    assert Supervisor(run_dir).pid() == pid
    assert launch.down(run_dir) is True
    assert running.ended() == 0 and running.err().endswith("supervisord has ended\n")


def test_the_end_of_supervisord_ends_everything(start):
    running = start("exec sleep 60")
    running.wait_err("up:")
    pids = json.loads((running.config.run_dir / "cluster.json").read_text())["pids"]
    os.kill(pids["supervisord"], signal.SIGKILL)
    assert running.ended() == 1
    assert "tetri-cli: supervisord was killed by SIGKILL: everything was stopped\n" in running.err()


def test_an_address_of_systemd_that_cannot_be_used_is_said_with_the_reason(monkeypatch):
    for address, reason in (("/nowhere/at/all", "No such file"), ("/" + "x" * 200, "too long")):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        said = []
        foreground.notify("READY=1", said.append)
        assert len(said) == 1 and address in said[0] and reason in said[0]
