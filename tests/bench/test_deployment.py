"""What a benchmark starts for itself."""

import signal
from pathlib import Path

import pytest

from tetri.bench.deployment import (
    EMULATED,
    SPLIT,
    START_S,
    check_straight,
    configured,
    own_folder,
    pinned,
    polled,
    running,
)
from tetri.bench.report import BenchError
from tetri.client import Client
from tetri.request import Receipt

DEFAULT = Path(__file__).parents[2] / "conf" / "default.toml"


def test_workers_are_pinned_and_on_the_only_cpu_it_says_so(tmp_path, capsys):
    config = pinned(DEFAULT, tmp_path, "demo", [3])
    assert {worker.cpus for worker in config.workers} == {"3"} and config.broker.cpus == "3"
    assert "one CPU only" in capsys.readouterr().err
    config = pinned(SPLIT, tmp_path, "demo", [2, 5], ["broker.cpus=4"])
    assert [(worker.role, worker.cpus) for worker in config.workers] == [("prefill", "2"), ("decode", "5")]
    assert config.broker.cpus == "4" and capsys.readouterr().err == ""
    config = pinned(DEFAULT, tmp_path, "demo", [2, 5])
    assert [(worker.role, worker.cpus) for worker in config.workers] == [("auto", "2"), ("auto", "5")]


def test_what_runs_can_be_asked_and_nothing_of_it_is_left():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        with own_folder("bench") as folder:
            config = configured(EMULATED, folder, "bench", [])
            with running(config, lambda text: None, START_S), Client(config.clients_address) as client:
                assert len(client.status()["instances"]) == len(config.workers)
            assert not [path for path in folder.iterdir() if path.is_socket()]
            assert signal.getsignal(signal.SIGINT) == handlers[0]
            assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
        assert not folder.exists()
    finally:
        signal.signal(signal.SIGTERM, handlers[1])
        signal.signal(signal.SIGHUP, handlers[2])


def test_a_folder_that_is_to_be_kept_is_named(capsys):
    with own_folder("bench", keep=True) as folder:
        pass
    folder.rmdir()
    assert capsys.readouterr().err == f"logs are in {folder}/log\n"


def test_polling_ends_with_what_is_enough_or_with_what_was_read_last():
    values = iter(range(10))
    assert polled(lambda: next(values), lambda value: value == 3, 60.0, 0.0) == 3
    assert polled(lambda: next(values), lambda value: False, 0.0, 0.0) == 4


@pytest.mark.parametrize("fault", [{"recomputed": 1}, {"preempted": 1}, {"attempts": 2}])
def test_the_times_of_a_request_that_met_a_fault_do_not_count(fault):
    straight = {"prompt_tokens": 9, "adopted": 9, "chunks": 1, "kv_bytes": 1}
    check_straight(Receipt(**straight))
    with pytest.raises(BenchError, match="was restarted, preempted or recomputed"):
        check_straight(Receipt(**straight, **fault))
