import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tetri.bench.compare import servers
from tetri.bench.compare.arrangements import Arrangement, arrangements
from tetri.bench.compare.servers import VllmServer, command_of, cpus_of, serving, shares, tetri_config
from tetri.bench.deployment import own_folder
from tetri.bench.report import BenchError
from tetri.config import load

CONF = Path(__file__).parents[3] / "conf"
DEFAULT = load(CONF / "default.toml")
KNOWN = arrangements(DEFAULT)
PLAYED = """
import http.server, os, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM's engine: it must not stay behind
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *_): pass
print(sorted(os.sched_getaffinity(0)), os.environ["MARK"], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def group(pid):
    """The processes of a process group that still run."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(entry))
    return found


@pytest.mark.parametrize(
    ("workers", "servers_", "expected"), [(2, 2, [[0], [1]]), (2, 1, [[0, 1]]), (4, 2, [[0, 1], [2, 3]])]
)
def test_each_server_stands_for_an_equal_part_of_the_workers(workers, servers_, expected):
    config = replace(DEFAULT, workers=DEFAULT.workers * (workers // 2))
    assert shares(config, servers_) == expected


def test_a_server_has_the_cpus_of_its_workers():
    allowed = sorted(os.sched_getaffinity(0))
    assert cpus_of(DEFAULT, [0]) == allowed[:1]
    assert cpus_of(DEFAULT, [0, 1]) == sorted({allowed[0], allowed[1 % len(allowed)]})


def options(name, workers, config=DEFAULT):
    command = command_of(KNOWN[name], config, workers, 8123)
    return command, dict(zip(command, command[1:], strict=False))


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(servers.models, "find", lambda name: Path("/folder") / name)


def test_vllm_serves_the_same_model_with_the_same_memory_and_else_its_defaults(model):
    command, given = options("vllm-2-least", [1])
    assert command[0] == sys.executable and "/folder/smollm2-135m" in command
    assert (given["--port"], given["--dtype"]) == ("8123", "bfloat16")
    assert given["--kv-cache-memory-bytes"] == str(1024 << 20)
    assert not {"--max-num-batched-tokens", "--max-model-len", "--tensor-parallel-size", "--enforce-eager"} & {*command}
    assert "--enforce-eager" in command_of(replace(KNOWN["vllm-2-least"], eager=True), DEFAULT, [1], 8123)


def test_one_server_has_the_memory_of_all_workers(model):
    assert options("vllm", [0, 1])[1]["--kv-cache-memory-bytes"] == str(2048 << 20)


def test_the_chunk_and_the_context_are_those_of_the_configuration(model):
    context = replace(DEFAULT, model=replace(DEFAULT.model, context=2304))
    _, given = options("vllm-2-512-rr", [0], context)
    assert (given["--max-num-batched-tokens"], given["--max-model-len"]) == ("512", "2304")


def test_one_server_on_several_gpus_splits_the_model(model):
    gpus = replace(DEFAULT, workers=tuple(replace(each, gpu=place) for place, each in enumerate(DEFAULT.workers)))
    assert options("vllm", [0, 1], gpus)[1]["--tensor-parallel-size"] == "2"
    assert "--tensor-parallel-size" not in options("vllm-2-rr", [1], gpus)[0]


def test_a_server_runs_on_its_cpus_and_ends_with_all_of_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "STOP_S", 0.5)  # its child ends by force only
    own, cpus = os.sched_getaffinity(0), sorted(os.sched_getaffinity(0))[-1:]
    command = [sys.executable, "-c", PLAYED, "--port", str(free_port())]
    server = VllmServer(command, {"MARK": "here"}, cpus, tmp_path / "log")
    try:
        server.wait_ready()
        assert (tmp_path / "log").read_text() == f"{cpus} here\n" and os.sched_getaffinity(0) == own
        pid = server._process.pid
        assert len(group(pid)) == 2
    finally:
        server.stop()
    end = time.monotonic() + 20
    while group(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert group(pid) == []


def test_a_server_that_ends_says_why(tmp_path):
    server = VllmServer(
        [sys.executable, "-c", "raise ValueError('no memory')", "--port", "9"],
        {},
        os.sched_getaffinity(0),
        tmp_path / "log",
    )
    try:
        with pytest.raises(BenchError, match="ended with status 1: ValueError: no memory"):
            server.wait_ready()
    finally:
        server.stop()


def test_a_server_that_is_never_ready_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "LOAD_S", 0.3)
    command = [sys.executable, "-c", "import time; time.sleep(600)", "--port", str(free_port())]
    server = VllmServer(command, {}, os.sched_getaffinity(0), tmp_path / "log")
    try:
        with pytest.raises(BenchError, match="was not ready after 0.3 s: its log is empty"):
            server.wait_ready()
    finally:
        server.stop()


def test_an_arrangement_gives_the_workers_their_roles(tmp_path):
    made = tetri_config(KNOWN["tetri-1+1"], CONF / "default.toml", tmp_path, ["engine.max_batch=8"])
    assert [(worker.role, worker.cpus) for worker in made.workers] == [("prefill", "+0"), ("decode", "+1")]
    assert (made.engine.max_batch, made.gateway.count, made.gateway.port) == (8, 1, 0)
    assert made.run_dir == tmp_path


def test_servers_that_run_already_are_left_alone(tmp_path):
    running = Arrangement("url", "", urls=("http://127.0.0.1:1",))
    with serving(running, DEFAULT, tmp_path, print) as urls:
        assert urls == ["http://127.0.0.1:1"]


def test_a_deployment_of_tetri_is_started_and_stopped():
    with own_folder("bench") as folder:
        arrangement = arrangements(load(CONF / "emulated.toml"))["tetri-2+2"]
        config = tetri_config(arrangement, CONF / "emulated.toml", folder, ())
        with serving(arrangement, config, folder, lambda text: None) as urls:
            assert [url.startswith("http://127.0.0.1:") for url in urls] == [True]
            assert servers._healthy(urls[0])
        assert not servers._healthy(urls[0])
