"""The observatory: when it asks the broker, and what it tells those who watch."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress

import pytest
from observations import histogram, observation, worker

from tetri.client import Unreachable
from tetri.proc.gateway import observatory
from tetri.proc.gateway.observatory import MOST_WATCHERS, Observatory
from tetri.wire.openai import ApiError


class Broker:
    """Answers with observations, each later one with a higher serial. `asked`: the questions."""

    def __init__(self):
        self.asked, self.error, self.epoch = [], None, 1
        self.answers = asyncio.Event()
        self.answers.set()

    async def observe(self, epoch, since):
        self.asked.append((epoch, since))
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        ended = {"rid": "r", "age_s": 0.0, "ttft_s": None, "tpot_s": 1.25}  # one more each time
        tpot = histogram(0, len(self.asked), 0, 0, total=1.25 * len(self.asked))
        happened = {"histograms": {"tpot": tpot}, "happened": {"ended": [ended]}}
        return observation(worker("p0"), epoch=self.epoch, serial=len(self.asked), **happened)


@asynccontextmanager
async def observing(broker):
    found = Observatory(broker)
    task = asyncio.ensure_future(found.run())
    try:
        yield found
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def run(talk):
    async def whole():
        made = Broker()
        async with observing(made) as found:
            await asyncio.wait_for(talk(made, found), 20)

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(observatory, "WATCHED_S", 0.01)
    monkeypatch.setattr(observatory, "POINT_S", 0.02)
    monkeypatch.setattr(observatory, "LATE_S", 0.02)


async def read(found, seen=None, turn=0):
    await found.later(turn)
    data, seen, turn = found.frame(seen)
    return json.loads(data[6:]), seen, turn


def test_each_question_goes_on_where_the_last_answer_ended():
    async def talk(broker, found):
        while len(broker.asked) < 4:
            await found.later(len(broker.asked))
        assert broker.asked[:4] == [(0, 0), (1, 1), (1, 2), (1, 3)]
        assert found.observation["epoch"] == 1 and found.history.instance("p0")

    run(talk)


def test_while_somebody_watches_it_asks_more_often(monkeypatch):
    monkeypatch.setattr(observatory, "POINT_S", 3600)

    async def talk(broker, found):
        await read(found)
        assert len(broker.asked) == 1  # the next is due in an hour
        with found.watching():
            while len(broker.asked) < 5:
                await asyncio.sleep(0.005)

    run(talk)


def test_a_point_knows_all_that_ended_since_the_one_before():
    async def talk(broker, found):
        with found.watching():  # so that there are several answers in one point
            while not (found.history.points and len(broker.asked) > 5):
                await asyncio.sleep(0.005)
        assert {point.tpot for point in found.history.points} == {(1.25, 1.25)}

    run(talk)


def test_a_watcher_waits_for_what_is_newer():
    async def talk(broker, found):
        with found.watching():
            first, seen, turn = await read(found)
            second, seen, later = await read(found, seen, turn)
        assert later > turn and "history" in first and "history" not in second

    run(talk)


def test_a_broker_that_does_not_answer_is_said_and_the_stream_goes_on():
    async def talk(broker, found):
        broker.answers.clear()
        with found.watching():
            turn = 0
            for _ in range(3):
                shown, _, turn = await read(found, None, turn)
            assert shown["notes"][0].startswith("the broker has not answered for ") and found.observation is None
            assert len(broker.asked) == 1  # a question that is not answered is not asked a second time
            broker.error = Unreachable("no answer")
            broker.answers.set()
            while "the broker does not answer: no answer" not in shown["notes"]:
                shown, _, turn = await read(found, None, turn)
            broker.error, broker.epoch = None, 2
            while shown["notes"]:
                shown, _, turn = await read(found, None, turn)
            assert shown["epoch"] == 2 and found.observation["epoch"] == 2

    run(talk)


def test_only_so_many_may_watch():
    async def talk(broker, found):
        watching = [found.watching() for _ in range(MOST_WATCHERS)]
        for each in watching:
            each.__enter__()
        with pytest.raises(ApiError, match="64 others watch this gateway") as refused, found.watching():
            pass
        assert refused.value.status == 503
        watching[0].__exit__(None, None, None)
        with found.watching():
            pass

    run(talk)


def test_the_end_wakes_those_who_watch():
    async def talk(broker, found):
        broker.answers.clear()
        waiting = asyncio.ensure_future(found.later(0))
        await asyncio.sleep(0)
        found.close()
        await waiting
        assert found.closed

    run(talk)
