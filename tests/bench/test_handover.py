"""tools/bench_handover: what it reads out of records, its picture, and its errors.
A run on the real model is in test_overhead.py."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from tetri.bench.handover import drive, picture, stages
from tetri.bench.handover.__main__ import shown, summarised
from tetri.bench.report import BenchError
from tetri.request import Receipt


def interval(begun, ended):
    return stages.Interval(begun, ended)


def move(copies, held_up=0.0, admitted=3.05):
    """Three passes of a second each; every chunk is in the slab 10 ms after its pass."""
    passes = [interval(k + 0.012 * (k > 0), k + 1.0) for k in range(3)]
    chunks = tuple(
        stages.Chunk(k, passes[k], interval(k + 1.0, k + 1.01), copy[0], interval(*copy))
        for k, copy in enumerate(copies)
    )
    return stages.Move("r", 1536, tuple(passes), chunks, held_up, interval(admitted, admitted + 0.03))


ON_TIME = [(1.02, 1.03), (2.02, 2.03), (3.02, 3.03)]


def test_the_stages_add_up_to_the_whole():
    found = move(ON_TIME)
    assert found.seconds == pytest.approx(0.05)
    assert sum(found.stages().values()) == pytest.approx(found.seconds)
    assert found.stages()["export"] == pytest.approx(0.01)
    assert found.stages()["copy"] == pytest.approx(0.01)
    assert found.stages()["admission"] == pytest.approx(0.02)


def test_waiting_for_the_others_step_is_not_the_messages_time():
    late = move([*ON_TIME[:2], (3.06, 3.07)], held_up=0.045, admitted=3.1)
    assert late.stages()["step_under_way"] == 0.045
    assert late.stages()["message"] == pytest.approx(0.005)
    assert sum(late.stages().values()) == pytest.approx(late.seconds)


def test_a_copy_lies_inside_the_pass_of_the_next_chunk_or_does_not():
    on_time = stages.overlap([move(ON_TIME)])
    assert (on_time.chunks, on_time.inside) == (2, 2)
    assert on_time.early_s == pytest.approx((-0.008, -0.008))
    after_the_pass = move([(1.02, 2.001), *ON_TIME[1:]])
    both = stages.overlap([move(ON_TIME), after_the_pass])
    assert (both.chunks, both.inside) == (4, 3)
    before_its_export = move([(1.005, 1.03), *ON_TIME[1:]])
    assert stages.overlap([before_its_export]).inside == 1
    in_between = stages.overlap([move([(1.011, 1.03), *ON_TIME[1:]])])
    assert in_between.inside == 2 and in_between.early_s[0] == pytest.approx(0.001)


def test_the_summary_compares_the_long_prompt_with_the_short_one():
    later = move([*ON_TIME[:2], (3.06, 3.07)], admitted=3.07)
    groups = {(state, length): [move(ON_TIME)] for state in ("idle", "busy") for length in (8, 1536)}
    found = summarised({**groups, ("busy", 1536): [later]}, 8, 1536, 16)
    assert found["idle"]["difference_ms"] == pytest.approx(0) and found["idle"]["ok"]
    assert found["busy"]["difference_ms"] == pytest.approx(20) and found["busy"]["limit_ms"] == pytest.approx(45)
    assert found["busy"]["lengths"]["1536"]["ms"]["worst"] == pytest.approx(70)
    lines = shown(found).splitlines()
    assert lines[1].split()[:4] == ["idle", "8", "50.0", "50.0"] and "2 of 2 (idle)" in lines[-1]


def test_the_picture_has_a_bar_for_each_pass_and_copy(tmp_path):
    assert [len(bars) for bars in picture.rows(move(ON_TIME)).values()] == [3, 3, 3, 1]
    picture.draw(tmp_path / "way.png", move(ON_TIME))
    assert (tmp_path / "way.png").read_bytes().startswith(b"\x89PNG\r\n")


class Client:
    """Of a cluster whose batch ends with the `lasts`-th hand-over beside it."""

    def __init__(self, lasts):
        self.lasts, self.running, self.served = lasts, 0, 0

    async def generate(self, prompt, max_tokens, ignore_eos):
        if max_tokens == drive.BATCH_OUTPUT:
            self.beside, self.end = 0, asyncio.Event()
            self.running += 1
            try:
                await self.end.wait()
            finally:
                self.running -= 1
        elif self.running:
            self.beside += 1
            if self.beside == self.lasts:
                self.end.set()
                await asyncio.sleep(0)
        self.served += 1
        return SimpleNamespace(rid=f"r{self.served}", receipt=Receipt(prompt_tokens=9))

    async def status(self):
        return {"instances": [{"iid": "d0", "load": {"running": self.running}}]}


def test_where_the_batch_ends_too_early_fewer_rounds_are_beside_it(monkeypatch):
    def run(lasts, lines):
        monkeypatch.setattr(drive, "AsyncClient", lambda *_, **__: contextlib.nullcontext(Client(lasts)))
        monkeypatch.setattr(drive, "PAUSE_S", 0.0)
        cluster = drive.Cluster(SimpleNamespace(clients_address=""), "p0", "d0")
        return drive.run(cluster, drive.Load((8, 16), rounds=4, batch=1), lines.append)

    lines = []
    found = run(5, lines)  # two in a round
    again = "the batch ended before the last hand-over: trying again, 2 rounds at a time"
    assert [line for line in lines if "again" in line] == [again]
    assert {group: len(rids) for group, rids in found.items()} == dict.fromkeys(
        [("idle", 8), ("idle", 16), ("busy", 8), ("busy", 16)], 4
    )
    assert len({rid for rids in found.values() for rid in rids}) == 16
    with pytest.raises(BenchError, match="ended before the last hand-over beside it"):
        run(1, lines)
