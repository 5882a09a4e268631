"""A length predictor in a live cluster: its answers reach the decode side, and nothing that may happen to it holds a
request up. The engines are emulated, and so is the classifier; the way between them is the real one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faked_predictor import folder, prologue
from live import EMULATED, LiveCluster, wait_until

from tetri.client import Result
from tetri.proc.recorder import read, value
from tetri.proc.replay import replay
from tetri.request import LengthRange
from tetri.wire.handover import LengthUpdate, Offer

PAIR = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]"
COSTS = "prefill = [[1, 0.01], [512, 0.05]]\ndecode = [[1, 0.0015], [32, 0.002]]\n"
OUTPUT = 20  # tokens of a request
LONG = 900  # which take more than a second: time for corrections


@contextmanager
def predicting(place: Path, temper: str, *more: str) -> Iterator[LiveCluster]:
    (place / "costs.toml").write_text(COSTS)
    own = ["policy.length=trained", "predictor.kind=classifier", f"predictor.folder={folder(place)}", PAIR]
    own += ["cluster.record=true", f"engine.cost={place}/costs.toml", "cluster.heartbeat_s=0.1", *more]
    with LiveCluster(overrides=own, prologue=prologue(temper)) as cluster:
        yield cluster


def ask(cluster: LiveCluster, *numbers: int, output: int = OUTPUT) -> list[Result]:
    """Requests at the same time, each with this number in its prompt."""
    client = cluster.client()
    streams = [client.stream(f"write {number} words", max_tokens=output) for number in numbers]
    return [stream.wait() for stream in streams]


def status(cluster: LiveCluster, iid: str = "p0") -> dict[str, Any]:
    """What its newest beat says; before the first one nothing is known of its predictor."""
    wait_until(lambda: cluster.instances()[iid]["predictor"] is not None, "no beat has told of the predictor")
    found = cluster.instances()[iid]["predictor"]
    assert isinstance(found, dict)
    return found


def heard(cluster: LiveCluster, iid: str, kind: type[Any]) -> list[Any]:
    (path,) = (cluster.folder / "record").glob(f"{iid}-*.events")
    calls = [call.event[0] for call in read(path)[1] if call.event]
    return [value(pair) for pair in calls if pair[0] == kind.__name__]


def replays_the_same(cluster: LiveCluster) -> None:
    cluster.stop()
    for path in (cluster.folder / "record").glob("*.events"):
        assert replay(path).difference is None


def test_predictions_reach_the_decode_side(tmp_path: Path) -> None:
    """Also while messages and KV go wrong on their way."""
    faults = "transfer.faults=drop=0.05,duplicate=0.1,reorder=0.1,flip=0.05,seed=3"
    with predicting(tmp_path, "quick", "predictor.mode=sequential", faults, "policy.length_granularity=100") as cluster:
        ask(cluster, 20, 120, 320, 720, 120, output=LONG)
        wait_until(lambda: status(cluster)["scored"] == 5, "not all lengths have come back")
        offers = {bytes(offer.prompt).decode(): offer.length for offer in heard(cluster, "d0", Offer)}
        for number, low in ((20, 0), (120, 100), (320, 300), (720, 700)):
            assert offers[f"write {number} words"] == LengthRange(low=low, high=low + 100)
        told = status(cluster)
        assert (told["kind"], told["on"], told["predicted"], told["late"]) == ("classifier", True, 5, 0)
        assert told["note"] == f"from {tmp_path}" and (told["cut"], told["unread"]) == (0, 0)
        assert status(cluster, "d0")["predicted"] == 0
        replays_the_same(cluster)


def test_a_slow_one_is_not_waited_for_and_corrects_the_offer(tmp_path: Path) -> None:
    with predicting(tmp_path, "slow", "policy.length_granularity=100", "policy.length_wait_s=0.05") as cluster:
        ask(cluster, 720, 320, 720, output=LONG)
        prior = {offer.length for offer in heard(cluster, "d0", Offer)}
        assert prior == {LengthRange(low=0, high=100)}, "the prior's likeliest bucket"
        later = [update_length.length for update_length in heard(cluster, "d0", LengthUpdate)]
        assert {length.low // 100 for length in later} == {3, 7}
        told = status(cluster)
        assert (told["late"], told["predicted"], told["on"]) == (3, 3, True)
        replays_the_same(cluster)


def test_one_that_never_answers_holds_up_neither_a_request_nor_the_end_of_its_worker(tmp_path: Path) -> None:
    with predicting(tmp_path, "never", "policy.length_wait_s=0.05") as cluster:
        assert [result.receipt.attempts for result in ask(cluster, 120, 20)] == [1, 1]


def test_one_that_fails_goes_off_alone(tmp_path: Path) -> None:
    with predicting(tmp_path, "moody") as cluster:
        client = cluster.client()
        client.generate("write 120 words", max_tokens=20)
        wait_until(lambda: status(cluster)["scored"] == 1, "it was not scored")
        assert status(cluster)["on"]
        client.generate("be moody", max_tokens=20)
        wait_until(lambda: not status(cluster)["on"], "it is not noticed")
        assert status(cluster)["note"].endswith("; the classifier failed: out of ideas")
        ask(cluster, *range(10))
        assert cluster.log("p0").count("the classifier is off from now on") == 1
        assert status(cluster)["predicted"] == 1


@pytest.mark.parametrize("program", ["tetri.cli", "tetri.proc.worker"])
def test_a_broken_one_is_one_line_at_the_start(program: str, tmp_path: Path) -> None:
    head = folder(tmp_path) / "classifier" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:60])
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", f"from {program} import main; main()"]
    command += ["up"] if program == "tetri.cli" else ["--iid", "p0"]
    settings = ["policy.length=trained", "predictor.kind=classifier", f"predictor.folder={tmp_path}"]
    for setting in (*settings, f"cluster.run_dir={run_dir}"):
        command += ["--set", setting]
    done = subprocess.run([*command, "--conf", str(EMULATED)], capture_output=True, text=True, timeout=60, check=False)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 2 and f'predictor.kind = "classifier": {head} is cut off' in said[-1]
    assert len(said) == 1 and "Traceback" not in done.stderr and not done.stdout
    assert not run_dir.exists()
