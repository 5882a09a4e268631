"""What each action of a worker's core does: one table for the live process and for the simulator."""

from random import Random
from typing import get_args

import pytest

from tests.core.build import CAPACITY, assign, identity
from tetri.core import actions as said
from tetri.core.actions import AddRequest, AdmitRequest, Adopt, Adopted, Export, Send, Step
from tetri.core.worker.worker import Worker
from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.emulated import EmulatedEngine
from tetri.engine_request import EngineRequest, StepDone
from tetri.executor import Copies, WorkerExecutor
from tetri.instance import Reach
from tetri.kv.base import Fetched, KVCorrupt, KVForeign, KVLost, KVShort, Wanted
from tetri.request import LengthRange, Sampling
from tetri.wire.handover import Handle

LEG = EngineRequest("k", "prefill", (1, 2), 2, Sampling())
HANDLE = Handle(segment="s", slots=[0], generations=[0], block_bytes=8)
REACH = Reach(paths=["shm"], host="h", process=1, segment="s")
PREDICT, EXPORT = said.Predict("k", (1,), Sampling()), Export("k", 0, 0, 1)
ADOPT = Adopt("k", 3, 1, HANDLE, 5, "p", "shm", ("k",))
FROM_A_WORKER = [  # one of each kind, and the calls that it is
    (Send("peer", "message"), [("send", "peer", "message")]),
    (said.Publish("report"), [("publish", "report")]),
    (said.Connect("peer", "address", REACH), [("connect", "peer", "address"), ("meet", "peer", REACH)]),
    (said.Disconnect("peer"), [("disconnect", "peer"), ("part", "peer")]),
    (Step(3), [("step", 3, None)]),
    (Step(3, 64), [("step", 3, 64)]),
    (AddRequest(LEG), [("add", LEG)]),
    (said.CancelRequest("k"), [("cancel", "k")]),
    (AdmitRequest("k", 7, (8,)), [("admit", "k", 7, (8,))]),
    (said.HoldRequest("k", True), [("hold", "k", True)]),
    (said.StayRequest("k", "d"), [("stay", "k", "d")]),
    (PREDICT, [("predict", PREDICT)]),
    (EXPORT, [("export", EXPORT)]),
    (ADOPT, [("adopt", ADOPT)]),
    (said.Free(HANDLE), [("free", HANDLE)]),
]
FROM_A_BROKER = {said.Reply, said.Detokenize, said.Release}


class Everything:
    """Engine, KV and network in one: notes every call, and fails where it is told to."""

    def __init__(self, fails=None):
        self.calls, self.fails = [], fails or {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fails:
                raise self.fails[name]

        return call


class Core:
    """Answers an event with the actions that were laid down for it."""

    def __init__(self, answers=()):
        self.heard, self.answers = [], dict(answers)

    def handle(self, event, now):
        self.heard.append((event, now))
        return self.answers.get(type(event), [])


def executor(core, all_of_it, **results):
    def answering(name):
        def answer(*arguments):
            getattr(all_of_it, name)(*arguments)
            return results.get(name)

        return answer

    parts = [all_of_it, all_of_it, all_of_it, answering("step"), answering("predict")]
    return WorkerExecutor(core, lambda: 4.5, *parts)


class Choosy(EmulatedEngine):
    """Runs no leg of `a`."""

    def add(self, engine_request):
        if engine_request.key == "p:a:1":
            raise EngineError("not a")
        super().add(engine_request)


def test_a_leg_that_the_engine_rejects_is_heard_of_when_the_others_are_there_and_before_the_step():
    """`b` would get the place of `a` in the chunk, which takes more slots than it may have: it is held, and must be
    in the engine before that."""
    engine = Choosy(capacity=CAPACITY, token_bytes=8, vocabulary=64, cost=Cost())
    core = Worker(identity("p1", "prefill", slots=4, fingerprint=engine.fingerprint), Random(1), 0.0)
    did = Everything()
    done = []

    def step(most, chunk):
        done.append(engine.step(most, chunk))

    made = WorkerExecutor(core, lambda: 4.5, engine, did, did, step, did.predict)
    for rid, most in (("a", 1), ("b", 8)):
        made.carry_out(core.handle(assign(rid, prompt=6, max_tokens=most), 0.0))
    made.carry_out(core.tick(0.0))
    (result,) = done
    assert result.spans == ()
    made.carry_out(core.handle(result, 0.0))


def test_every_action_but_the_brokers_is_in_the_table():
    kinds = {type(action) for action, _ in FROM_A_WORKER}
    assert {*get_args(said.Action)} - FROM_A_BROKER == kinds == {*executor(Core(), Everything()).table}


def test_each_action_is_one_call():
    core, did = Core(), Everything()
    executor(core, did).carry_out([action for action, _ in FROM_A_WORKER])
    assert did.calls == [call for _, calls in FROM_A_WORKER for call in calls] and core.heard == []


def test_no_kv_is_ever_read_from_a_broker():
    did = Everything()
    executor(Core(), did).carry_out([said.Connect("broker", "address")])
    assert did.calls == [("connect", "broker", "address")]


def test_what_the_core_says_to_a_result_comes_after_the_other_actions():
    """A chunk of an exported prompt may end a choice whose request the same actions have just added."""
    ended = said.Exported("k", 0, 0, 2, HANDLE, 9)
    core, did = Core({said.Exported: [said.CancelRequest("k")]}), Everything()
    made = executor(core, did)
    made.table[said.Export] = lambda do: ended
    made.carry_out([EXPORT, AddRequest(LEG)])
    assert did.calls == [("add", LEG), ("cancel", "k")] and core.heard == [(ended, 4.5)]


def test_what_the_core_says_to_a_result_comes_before_a_step():
    known = said.LengthKnown("k", LengthRange(low=1, high=2))
    core, did = Core({StepDone: [said.CancelRequest("a")], said.LengthKnown: [said.CancelRequest("b")]}), Everything()
    executor(core, did, step=StepDone(), predict=known).carry_out([PREDICT, Send("p", "m"), Step()])
    calls = [("predict", PREDICT), ("send", "p", "m"), ("cancel", "b"), ("step", 1, None), ("cancel", "a")]
    assert did.calls == calls and core.heard == [(known, 4.5), (StepDone(), 4.5)]


def test_lengths_named_while_the_engine_computes_are_told_before_its_step_is():
    known = said.LengthKnown("k", None)
    core, did = Core({said.LengthKnown: [said.CancelRequest("b")]}), Everything()
    named = []

    def step(most, chunk):
        named.append(known)  # by another thread, in the meantime
        return StepDone()

    made = WorkerExecutor(core, lambda: 4.5, did, did, did, step, did.predict, lambda: iter(named))
    made.carry_out([Step()])
    assert core.heard == [(known, 4.5), (StepDone(), 4.5)] and did.calls == [("cancel", "b")]


@pytest.mark.parametrize(
    "action", [AddRequest(LEG), AdmitRequest("k", 7), said.StayRequest("k", "d")], ids=["add", "admit", "stay"]
)
def test_what_the_engine_cannot_run_comes_back_as_an_event(action):
    core, did = Core(), Everything(dict.fromkeys(("add", "admit", "stay"), EngineError("too long")))
    executor(core, did).carry_out([action])
    assert core.heard == [(said.RequestRejected("k", "too long"), 4.5)]


# ---------------------------------------------------------------- copies


class Store:
    """Takes a chunk at once, or when `arrive` is called."""

    def __init__(self, problem=None, *, at_once=True):
        self.problem, self.at_once = problem, at_once
        self.wanted, self.arrived, self.came_free = [], [], 0

    def put(self, count, write, owner=""):
        write([f"{owner}'s block {i}" for i in range(count)])
        return HANDLE, 99

    def fetch(self, wanted):
        self.wanted.append(wanted)
        return self._fetched(wanted) if self.at_once else None

    def _fetched(self, wanted):
        return Fetched(wanted.ticket, () if self.problem else ("block",), self.problem)

    def arrive(self):
        self.arrived.append(self._fetched(self.wanted[len(self.arrived)]))

    def fetched(self):
        while self.arrived:
            yield self.arrived.pop(0)

    def free(self, handle):
        self.came_free += len(handle.slots)

    def freed(self):
        count, self.came_free = self.came_free, 0
        return count

    meet = part = due = None  # not for what copies


def copies(engine, store):
    noted = []
    return Copies(engine, store, lambda *told: noted.append(told)), noted


def test_a_chunk_is_put_into_the_store_and_taken_out_of_it():
    engine, store = Everything(), Store()
    kv, noted = copies(engine, store)
    assert kv.export(Export("k", 3, 1, 3)) == said.Exported("k", 3, 1, 3, HANDLE, 99)
    assert kv.adopt(ADOPT) == Adopted("k", 3)
    assert store.wanted == [Wanted(("k", 3), "p", "shm", HANDLE, 5)]
    assert engine.calls == [("export", "k", 1, 3, ["k's block 0", "k's block 1"]), ("adopt", "k", 1, ("block",))]
    assert noted == []


def test_a_chunk_that_takes_time_is_adopted_once_when_it_has_come_if_twice():
    """The core may wait for another one of the same key by then."""
    engine, store = Everything(), Store(at_once=False)
    kv, noted = copies(engine, store)
    assert kv.adopt(ADOPT) is None and [*kv.events()] == [] and engine.calls == []
    store.arrive()
    store.arrived *= 2
    assert [*kv.events()] == [Adopted("k", 3)] and [*kv.events()] == []
    assert engine.calls == [("adopt", "k", 1, ("block",))]
    assert [(str(error)[:29], *where) for error, *where in noted] == [("nobody waits for this chunk: ", "k", 3)]


def test_slots_are_told_when_they_are_free_be_it_later():
    store = Store()
    kv, _ = copies(Everything(), store)
    assert kv.free(HANDLE) == said.Freed(1)
    store.came_free = 3  # what another owner has let go
    assert [*kv.events()] == [said.Freed(3)] and [*kv.events()] == []


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("store_error", "engine_error", "problem"),
    [
        (KVCorrupt("bad digest"), None, "flipped"),
        (KVShort("3 of 8 bytes"), None, "truncated"),
        (KVForeign("of another slab"), None, "foreign"),
        (KVLost("slot reused"), None, "lost"),
        (None, EngineError("no such leg"), "lost"),
    ],
)
def test_what_goes_wrong_with_a_copy_is_said_and_noted(store_error, engine_error, problem, at_once):
    engine = Everything({"adopt": engine_error} if engine_error else None)
    store = Store(store_error, at_once=at_once)
    kv, noted = copies(engine, store)
    adopted = kv.adopt(ADOPT)
    if not at_once:
        assert adopted is None
        store.arrive()
        (adopted,) = kv.events()
    assert adopted == Adopted("k", 3, problem)
    assert noted == [(store_error or engine_error, "k", 3)]


def test_fewer_blocks_than_announced_are_never_adopted():
    engine, store = Everything(), Store()
    kv, noted = copies(engine, store)
    two = Handle(segment="s", slots=[0, 1], generations=[0, 0], block_bytes=8)
    assert kv.adopt(Adopt("k", 3, 1, two, None, "p", "shm", ("k",))) == Adopted("k", 3, "truncated")
    assert engine.calls == [] and str(noted[0][0]) == "1 of 2 blocks have come"


class Some(Everything):
    """An engine that has only some of the requests."""

    def __init__(self, *keys):
        super().__init__()
        self.keys = keys

    def adopt(self, key, start, blocks):
        if key not in self.keys:
            raise EngineError(f"no request {key}")
        self.calls.append(("adopt", key, start, blocks))


@pytest.mark.parametrize(("there", "missed"), [("abc", ()), ("ac", ("b",)), ("c", ("a", "b"))])
def test_a_chunk_is_fetched_once_and_adopted_by_each_request_that_is_still_there(there, missed):
    engine, store = Some(*there), Store()
    kv, noted = copies(engine, store)
    adopt = Adopt("k", 3, 1, HANDLE, 5, "p", "shm", ("a", "b", "c"))
    assert kv.adopt(adopt) == Adopted("k", 3, None, missed)
    assert store.wanted == [Wanted(("k", 3), "p", "shm", HANDLE, 5)] and noted == []
    assert engine.calls == [("adopt", key, 1, ("block",)) for key in there]


def test_a_chunk_that_no_request_waits_for_any_more_is_lost():
    kv, noted = copies(Some(), Store())
    adopted = kv.adopt(Adopt("k", 3, 1, HANDLE, 5, "p", "shm", ("a", "b")))
    assert adopted == Adopted("k", 3, "lost") and [str(error) for error, *_ in noted] == ["no request b"]
