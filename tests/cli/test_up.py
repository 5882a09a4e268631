"""tetri-cli up, without anything that starts."""

import io
import sys

import pytest
from live import EMULATED

from tetri.proc import foreground, launch


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (["prefill", "decode", "decode"], "on 1 prefill and 2 decode workers"),
        (["mixed"], "on 1 mixed workers"),
        (["prefill", "decode", "mixed"], "on 1 prefill, 1 decode and 1 mixed workers"),
    ],
)
def test_up_counts_the_workers_by_role(run, monkeypatch, roles, says):
    monkeypatch.setattr(launch, "up", lambda config, say, wait_s: config.run_dir)
    workers = ",".join(f'{{iid="w{i}",role="{role}"}}' for i, role in enumerate(roles))
    assert says in run("up", "--set", f"worker=[{workers}]")[1]


def test_up_tells_where_things_listen(run, place, monkeypatch):
    def fake_up(config, say, wait_s):
        (place / "gateway.json").write_text('{"url": "http://127.0.0.1:8000"}')
        say("p0 (prefill) is ready")
        return config.run_dir

    monkeypatch.setattr(launch, "up", fake_up)
    status, out, err = run("up", "--conf", EMULATED, "--set", "broker.clients=tcp://127.0.0.1:7777")
    assert status == 0 and "tcp://127.0.0.1:7777" in out and f"{place}/log" in out
    assert "http     http://127.0.0.1:8000/v1\npage     http://127.0.0.1:8000\n" in out
    assert err == "p0 (prefill) is ready\n"


def test_in_the_foreground_all_progress_is_on_stderr(run, place, monkeypatch):
    def fake_run(config, report, wait_s, summary):
        report(f"wait {wait_s:g}")
        for line in summary(config.run_dir):
            report(line)

    monkeypatch.setattr(foreground, "run", fake_run)
    status, out, err = run("up", "--foreground", "--wait", "7", "--conf", EMULATED)
    assert (status, out) == (0, "") and err.startswith("wait 7\nup: an emulated model") and f"{place}/log" in err


def test_a_disk_that_is_full_is_one_line(run, monkeypatch):
    def fake_up(config, say, wait_s):
        raise OSError(28, "No space left on device", "/run/cluster.toml")

    monkeypatch.setattr(launch, "up", fake_up)
    assert run("up") == (1, "", "tetri-cli: /run/cluster.toml: No space left on device\n")


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_a_terminal_without_unicode_gets_a_spinner_that_it_can_show(run, monkeypatch):
    def fake_up(config, say, wait_s):
        say("p0 (prefill) is ready")
        return config.run_dir

    monkeypatch.setattr(launch, "up", fake_up)
    monkeypatch.setattr(sys, "stderr", Terminal(io.BytesIO(), encoding="latin-1"))
    assert run("up", "--conf", EMULATED)[0] == 0
    shown = sys.stderr.buffer.getvalue()
    assert b"p0 (prefill) is ready" in shown and shown.isascii() and b"\\u" not in shown
