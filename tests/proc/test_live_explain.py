"""tetri-cli explain of a real request whose decode worker was killed."""

import json
import tempfile

import pytest
from live import LiveCluster, wait_until

from tests.cli.trace_processor import query
from tetri import cli

ONE_AND_TWO = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}, {iid='d1', role='decode'}]"
PROMPT, OUTPUT = [7] * 1200, 60
CHUNKS = 2 * 3  # of 512 tokens at most, in two attempts


def chunks(timeline):
    return [event for event in timeline["events"] if event[0] == "chunk"]


@pytest.fixture(scope="module")
def served():
    """The id of a request that was decoded by two workers, its cluster, and what a client got."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as table:
        table.write("prefill = [[1, 0.005], [512, 0.02]]\ndecode = [[1, 0.01], [32, 0.01]]\n")
        table.flush()
        with LiveCluster(overrides=[f"engine.cost={table.name}", ONE_AND_TWO]) as cluster:
            addresses = {"clients": cluster.config.clients_address, "operators": cluster.config.clients_address}
            (cluster.folder / "cluster.json").write_text(json.dumps(addresses))
            client = cluster.client()
            stream = client.events(PROMPT, max_tokens=OUTPUT)
            for _ in range(10):
                next(stream)
            cluster.kill(client.explain(stream.rid)["stages"][-1][2])
            result = stream.wait()
            wait_until(lambda: len(chunks(client.explain(stream.rid))) >= CHUNKS, "the chunks are not reported")
            yield stream.rid, cluster, result


def explained(capfd, cluster, *arguments):
    """What tetri-cli explain prints."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", "--set", f"cluster.run_dir={cluster.folder}", *map(str, arguments)])
    assert ended.value.code == 0
    return capfd.readouterr().out


def test_it_names_the_retry_and_the_migration(served, capfd):
    rid, cluster, result = served
    (dead,) = cluster.killed
    (other,) = {"d0", "d1"} - {dead}
    lines = explained(capfd, cluster, rid).splitlines()
    (retry,) = [line for line in lines if line.startswith("retry")]
    (migrated,) = [line for line in lines if line.startswith("migrated")]
    assert f"attempt 2: {dead}" in retry and f"from {dead} to {other}" in migrated
    assert sum(line.split()[:1] == ["chunk"] for line in lines) >= CHUNKS
    assert sum(int(line.split()[1]) for line in lines if line.startswith("steps ")) >= OUTPUT - 2
    listed = explained(capfd, cluster).splitlines()
    assert listed[-1].split()[0] == rid and f"> {other}" in listed[-1]


def test_its_trace_has_a_slice_per_stage_step_and_chunk(served, capfd, tmp_path):
    rid, cluster, result = served
    found = json.loads(explained(capfd, cluster, rid, "--json", "--perfetto", tmp_path / "trace.json"))
    (slices,) = query(
        json.loads((tmp_path / "trace.json").read_text()), "select name, count(*) as n from slice group by name"
    )
    kinds = [*(span[0] for span in found["stages"]), *(event[0] for event in found["events"])]
    expected = {kind: kinds.count(kind) for kind in kinds} | {"step": len(found["steps"])}
    assert dict(slices) == expected and sum(step[3] for step in found["steps"]) == OUTPUT == len(result.token_ids)
