"""What those who look on see of a real deployment: over the gateway's stream, and in the metrics."""

import json
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
from live import LiveCluster, free_port, wait_until
from prometheus_client.parser import text_string_to_metric_families

FRAMES_S = 5  # messages of the stream
SOON_S = 2  # within which a change is seen


class Watcher(threading.Thread):
    """Reads the stream of a gateway. `frames`: what has come."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self._answer = urllib.request.urlopen(f"{url}/live", timeout=20)
        self.frames = []

    def run(self):
        for line in self._answer:
            if line.startswith(b"data: "):
                self.frames.append(json.loads(line[6:]))

    def shows(self, what, shown, since):
        """Wait until a message after the first `since` ones shows it; return how many came before that."""
        wait_until(lambda: any(map(shown, self.frames[since:])), f"the stream does not show {what}")
        return [*map(shown, self.frames[since:])].index(True)


@contextmanager
def watching(url):
    watcher = Watcher(url)
    watcher.start()
    wait_until(lambda: watcher.frames, "nothing comes")
    yield watcher


@pytest.fixture(scope="module")
def cluster():
    port = free_port()
    with LiveCluster(overrides=[f"broker.metrics_port={port}", "engine.cost=cpu-smollm2.toml"]) as cluster:
        cluster.metrics_url = f"http://127.0.0.1:{port}/metrics"
        cluster.url = cluster.start_gateway()
        yield cluster


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def complete(cluster, **body):
    body = json.dumps({"ignore_eos": True, **body}).encode()  # else chance may end it early
    asked = urllib.request.Request(f"{cluster.url}/v1/completions", body, {"X-Tetri-Receipt": "1"})
    with urllib.request.urlopen(asked, timeout=20) as answer:
        return json.loads(answer.read())


def scraped(url):
    families = text_string_to_metric_families(get(url))
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def wait_for_requests(url, count):
    """The metrics, once they have so many ended requests."""
    seen = []
    wait_until(
        lambda: seen.append(scraped(url)) or seen[-1].get(("tetri_jct_seconds_count",)) == count,
        f"the metrics lack a request: {seen[-1:]}",
    )
    return seen[-1]


def test_the_metrics_agree_with_the_answers_of_the_same_requests(cluster):
    answers = [complete(cluster, prompt="Hello " * number, max_tokens=5) for number in (1, 10, 100)]
    answers.append(complete(cluster, prompt="Hello", max_tokens=4, n=2, temperature=1))
    served = [choice for answer in answers for choice in answer["tetri"]["choices"]]
    assert len(served) == 5
    for url in (f"{cluster.url}/metrics", cluster.metrics_url):
        found = wait_for_requests(url, 5)
        for name in ("ttft", "jct"):
            total = sum(choice[f"{name}_s"] for choice in served)
            assert found[f"tetri_{name}_seconds_count",] == 5
            assert found[f"tetri_{name}_seconds_sum",] == pytest.approx(total, abs=1e-3)
        for stage in ("queued", "decode"):
            total = sum(choice["timeline"].get(stage, 0) for choice in served)
            assert found["tetri_stage_seconds_sum", stage] == pytest.approx(total, abs=1e-3)
        assert found["tetri_requests_ended_total", "length"] == 5
        assert found["tetri_tokens_total", "output"] == sum(a["usage"]["completion_tokens"] for a in answers)
    chunks = sum(value for key, value in found.items() if key[0] == "tetri_kv_received_chunks_total")
    assert chunks == sum(choice["receipt"]["chunks"] for choice in served)


def test_an_answer_leads_to_its_timeline(cluster):
    answer = complete(cluster, prompt="Hello", max_tokens=3, n=2)
    timeline = json.loads(get(f"{cluster.url}/live/requests/{answer['id']}"))
    assert f"cmpl-{timeline['rid']}" == answer["id"] and timeline["outputs"] == 3
    assert timeline["jct_s"] == pytest.approx(answer["tetri"]["choices"][0]["jct_s"])
    second = [json.loads(get(f"{cluster.url}/live/requests/{answer['id']}{way}")) for way in (".1", "?choice=1")]
    assert [each["choice"] for each in second] == [1, 1]


def test_the_stream_shows_what_happens_soon(cluster):
    with watching(cluster.url) as watcher:
        cluster.operator().flip("p1", "mixed")
        since = len(watcher.frames)
        late = watcher.shows("a role", lambda frame: row(frame, "p1")["role"] == "mixed", since)
        rid = complete(cluster, prompt="Hello", max_tokens=3)["id"].removeprefix("cmpl-")
        watcher.shows("an end", lambda frame: rid in [end["rid"] for end in frame["ended"]], since)
        moves = [move[:2] for frame in watcher.frames for move in frame["moves"] if move[0] == rid]
        assert moves[0] == [rid, "queued"] and moves[-1] == [rid, "done"] and [rid, "decode"] in moves
        cluster.kill("d1")
        since = len(watcher.frames)
        late = max(late, watcher.shows("a lost worker", lambda frame: row(frame, "d1")["state"] == "lost", since))
    assert late <= SOON_S * FRAMES_S
    assert any(event[:2] == ["role", "p1"] for frame in watcher.frames for event in frame["events"])
    minutes = json.loads(get(f"{cluster.url}/live/instances/p1"))["points"]
    assert {point["role"] for point in minutes} <= {"prefill", "mixed"}


def row(frame, iid):
    return next((each for each in frame["instances"] if each["iid"] == iid), {})


def test_a_broker_that_starts_again_is_shown(cluster):
    with watching(cluster.url) as watcher:
        (epoch,) = {frame["epoch"] for frame in watcher.frames}
        cluster.kill("broker")
        wait_until(lambda: any("broker" in note for note in watcher.frames[-1]["notes"]), "nothing is said")
        assert scraped(f"{cluster.url}/metrics")["tetri_broker_up",] == 0
        cluster.start("broker")
        wait_until(lambda: watcher.frames[-1]["epoch"] != epoch, "the broker's new start is not shown")
        assert watcher.frames[-1]["now"] <= time.time() + 1
