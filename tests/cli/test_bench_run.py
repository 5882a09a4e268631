"""tetri-cli bench run, on emulated engines."""

import json

from live import LiveCluster

LOAD = ("--workload", "LPLD", "--requests", "6", "--rate", "10")
FAST = ("bench", "run", "--conf", "conf/emulated.toml", "--set", "engine.cost=cpu-smollm2.toml", "--set",
        "emulated.time_scale=0.2", *LOAD)  # fmt: skip


def test_one_arrangement_is_started_measured_and_stopped(run, place):
    status, text, err = run(*FAST, "--arrangement", "tetri-mixed", "--ttft", "60", "--tpot", "60")
    assert status == 0, err
    assert text.startswith("LPLD at 10 requests/s (10), given: TTFT <= 60 s, TPOT <= 6e+04 ms")
    assert "tetri-mixed" in text and "100.0%" in text


def test_a_server_that_runs_already_is_asked(run, place):
    with LiveCluster() as cluster:
        url = cluster.start_gateway()
        status, text, err = run(
            "bench", "run", "--conf", "conf/emulated.toml", *LOAD, "--url", f"{url}/v1", "--json",
        )  # fmt: skip
    assert status == 0, err
    (cell,) = json.loads(text)["cells"]
    row = cell["arrangements"]["url"]
    assert row["failed"] == 0 and row["measured"]["attained"] == 1 and row["predicted"]["JCT mean"] is None


def test_a_server_that_does_not_answer_is_said(run, place):
    status, text, err = run(*FAST, "--url", "http://127.0.0.1:9")
    assert status == 1 and "http://127.0.0.1:9 does not answer: ClientConnectorError" in err
