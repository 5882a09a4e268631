"""What each action of a worker's core does: one table for the live process, the simulator and the virtual cluster."""

from typing import get_args

import pytest

from tetri.core import actions as said
from tetri.core.actions import AddLeg, AdmitLeg, Adopt, Adopted, Export, Exported, LegRejected, Publish, Send, Step
from tetri.engine.base import EngineError
from tetri.hands import Copies, WorkerHands
from tetri.kv.base import KVCorrupt, KVLost
from tetri.leg import Leg, StepDone
from tetri.request import LengthRange, Sampling
from tetri.wire.messages import Handle

LEG = Leg("k", "prefill", (1, 2), 2, Sampling())
HANDLE = Handle(segment="s", slots=[0], generations=[0], block_bytes=8)
FROM_A_WORKER = {  # one of each kind
    Send: Send("peer", "message"),
    Publish: Publish("report"),
    said.Connect: said.Connect("peer", "address"),
    said.Disconnect: said.Disconnect("peer"),
    Step: Step(3),
    AddLeg: AddLeg(LEG),
    said.CancelLeg: said.CancelLeg("k"),
    AdmitLeg: AdmitLeg("k", 7),
    said.HoldLeg: said.HoldLeg("k", True),
    said.Predict: said.Predict("k", (1,), Sampling()),
    Export: Export("k", 0, 0, 1),
    Adopt: Adopt("k", 0, 0, HANDLE, 5),
    said.Free: said.Free(HANDLE),
    said.Forget: said.Forget("s"),
}
FROM_A_BROKER = {said.Reply, said.Word, said.Unword}


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


def hands(core, all_of_it, **results):
    def step(most):
        all_of_it.calls.append(("step", most))
        return results.get("step")

    def predict(wanted):
        all_of_it.calls.append(("predict", wanted))
        return results.get("predict")

    return WorkerHands(core, lambda: 4.5, all_of_it, all_of_it, all_of_it, step, predict)


def test_every_action_but_the_brokers_is_in_the_table():
    assert {*get_args(said.Action)} - FROM_A_BROKER == {*FROM_A_WORKER}
    assert {*hands(Core(), Everything()).table} == {*FROM_A_WORKER}


def test_each_action_is_one_call():
    core, did = Core(), Everything()
    hands(core, did).carry_out([*FROM_A_WORKER.values()])
    assert did.calls == [
        ("send", "peer", "message"),
        ("publish", "report"),
        ("connect", "peer", "address"),
        ("disconnect", "peer"),
        ("step", 3),
        ("add", LEG),
        ("cancel", "k"),
        ("admit", "k", 7),
        ("hold", "k", True),
        ("predict", FROM_A_WORKER[said.Predict]),
        ("export", FROM_A_WORKER[Export]),
        ("adopt", FROM_A_WORKER[Adopt]),
        ("free", HANDLE),
        ("forget", "s"),
    ]
    assert core.heard == []


def test_what_the_core_says_to_a_result_comes_before_the_next_action():
    known = said.LengthKnown("k", LengthRange(low=1, high=2))
    core, did = Core({StepDone: [said.CancelLeg("a")], said.LengthKnown: [said.CancelLeg("b")]}), Everything()
    hands(core, did, step=StepDone(), predict=known).carry_out([Step(), FROM_A_WORKER[said.Predict], Send("p", "m")])
    assert [call[0:2] for call in did.calls if call[0] != "predict"] == [
        ("step", 1),
        ("cancel", "a"),
        ("cancel", "b"),
        ("send", "p"),
    ]
    assert core.heard == [(StepDone(), 4.5), (known, 4.5)]


@pytest.mark.parametrize("action", [AddLeg(LEG), AdmitLeg("k", 7)], ids=["add", "admit"])
def test_what_the_engine_cannot_run_comes_back_as_an_event(action):
    core, did = Core(), Everything({"add": EngineError("too long"), "admit": EngineError("too long")})
    hands(core, did).carry_out([action])
    assert core.heard == [(LegRejected("k", "too long"), 4.5)]


# ---------------------------------------------------------------- copies


class Store:
    def __init__(self, error=None):
        self.error = error

    def put(self, count, write):
        write([f"view {i}" for i in range(count)])
        return HANDLE, 99

    def take(self, handle, digest):
        if self.error is not None:
            raise self.error
        return [f"{handle.segment} {digest}"]

    def free(self, handle):
        pass

    def forget(self, segment):
        pass


def test_a_chunk_is_put_into_the_store_and_taken_out_of_it():
    engine, noted = Everything(), []
    copies = Copies(engine, Store(), lambda *told: noted.append(told))
    assert copies.export(Export("k", 3, 1, 3)) == Exported("k", 3, 1, 3, HANDLE, 99)
    assert copies.adopt(Adopt("k", 3, 1, HANDLE, 5)) == Adopted("k", 3)
    assert engine.calls == [("export", "k", 1, 3, ["view 0", "view 1"]), ("adopt", "k", 1, ["s 5"])]
    assert noted == []


@pytest.mark.parametrize(
    ("store_error", "engine_error", "problem"),
    [
        (KVCorrupt("bad digest"), None, "corrupt"),
        (KVLost("slot reused"), None, "lost"),
        (None, EngineError("no such leg"), "lost"),
    ],
)
def test_what_goes_wrong_with_a_copy_is_said_and_noted(store_error, engine_error, problem):
    noted = []
    engine = Everything({"adopt": engine_error} if engine_error else None)
    copies = Copies(engine, Store(store_error), lambda *told: noted.append(told))
    assert copies.adopt(Adopt("k", 3, 1, HANDLE, 5)) == Adopted("k", 3, problem)
    assert noted == [(store_error or engine_error, "k", 3)]
