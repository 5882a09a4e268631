"""A worker's virtual process: runs of several passes that are cut short, what it spends its time on, its predictor."""

from types import SimpleNamespace

import pytest

from tests.sim.script import COST, Script
from tetri.core.actions import AddRequest, AdmitRequest, LengthKnown, Predict, Step
from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.core.worker import load_report
from tetri.core.worker.load_report import StepTimes
from tetri.cost import Cost
from tetri.engine_request import EngineRequest, StepDone
from tetri.policy.rules import Rules
from tetri.request import LengthRange, Sampling
from tetri.sim import instance
from tetri.sim.instance import PlainWorker, SimulatedPredictor, Use
from tetri.sim.links import Port, Wiring
from tetri.sim.scripted import Scripted
from tetri.sim.setup import Setup
from tetri.sim.traces import TokenCounts, drawn
from tetri.sim.world import World
from tetri.wire.messages import ClusterView, Heartbeat


def worker(kernel):
    core = Script()
    return core, PlainWorker(kernel, core, Port(Wiring(kernel, 0.0), "w"), float("inf"), 0)


@pytest.fixture
def decoding(kernel):
    """A worker whose engine begins to make up to 10 passes of a decode at 1.0."""
    core, node = worker(kernel)
    engine_request = EngineRequest("d", "decode", (1, 1, 1, 1), 4, Sampling(max_tokens=100, ignore_eos=True))
    core.next = [AddRequest(engine_request), Step()]
    node.start()
    core.next = [AdmitRequest("d", 1), Step(10)]
    kernel.at(1.0, node.receive, "begin")
    return core, node


VIEW = ClusterView(epoch=1, number=1, loads=[])
NAMED = LengthKnown("d", LengthRange(low=7, high=8))
STEP = "the step"


@pytest.mark.parametrize(
    ("arrives", "end", "passes", "heard"),
    [
        ({}, 2.0, 10, [STEP]),
        ({1.25: ["first"], 1.28: ["second"]}, 1.3, 3, [STEP, "first", "second"]),  # after the pass under way
        ({1.25: [VIEW]}, 2.0, 10, [STEP, VIEW]),  # a view ends no run
        ({1.95: ["late"]}, 2.0, 10, [STEP, "late"]),  # during the last pass
        ({1.25: ["before", NAMED, "after"]}, 1.3, 3, [NAMED, STEP, "before", "after"]),  # lengths before the step
    ],
)
def test_a_run_of_several_passes_and_what_arrives_during_it(kernel, decoding, arrives, end, passes, heard):
    core, node = decoding
    for when, events in arrives.items():
        for event in events:
            kernel.at(when, node.receive, event)
    kernel.run()
    after = core.heard[2:]  # the first step, and "begin"
    (step,) = (event for _, event in after if isinstance(event, StepDone))
    assert step.steps == passes == node.use.decode_tokens
    assert node.use.busy_s == {"decode": pytest.approx(passes * 0.1)}
    assert after == [(pytest.approx(end), step if event == STEP else event) for event in heard]


def test_while_the_engine_computes_no_timer_fires(kernel, decoding):
    core, _ = decoding
    kernel.at(1.01, lambda _: setattr(core, "due", 1.05))
    kernel.run()
    assert [now for now in core.ticks if 1.0 < now < 1.99] == []


def test_prefill_is_told_apart_in_the_use(kernel):
    core, node = worker(kernel)
    node.use.spans = []
    engine_request = EngineRequest("p", "prefill", (1,) * 30, 30, Sampling(max_tokens=5, ignore_eos=True))
    core.next = [AddRequest(engine_request), Step()]
    node.start()
    core.next = [Step()]
    kernel.run()
    assert node.use.prefill_tokens == 30 and node.use.steps == 2
    assert node.use.spans == [(0.0, 1.0, "prefill")]


def test_use_joins_spans_that_touch_and_are_alike():
    use = Use(spans=[])
    for start, stop, what in ((0, 1, "prefill"), (1, 2, "prefill"), (2, 3, "decode"), (4, 5, "decode")):
        use.add(start, stop, what)
    assert use.spans == [(0, 2, "prefill"), (2, 3, "decode"), (4, 5, "decode")]
    assert (use.first_s, use.last_s, use.busy_s) == (0, 5, {"prefill": 2, "decode": 2})


SLOW = Cost(prefill=COST.prefill, decode=COST.decode, predictor_s=1.0, predictor_token_s=0.1, predictor_slowdown=2.0)
ORACLE = Rules(length="oracle")


def predictor(kernel, cost=SLOW, rules=ORACLE, seed=0, tell=print):
    return SimulatedPredictor(kernel, SimpleNamespace(rules=rules, cost=cost), seed, tell)


def predict(key, tokens):
    return Predict(key, (1,) * tokens, Sampling(max_tokens=7, ignore_eos=True))


def test_predictions_run_one_after_the_other(kernel):
    heard = []
    slow = predictor(kernel, tell=lambda event: heard.append((kernel.now, event)))
    assert slow.predict(predict("a", 10)) is slow.predict(predict("b", 20)) is None
    kernel.run()
    seven = LengthRange(low=7, high=8)
    assert heard == [(2.0, LengthKnown("a", seven)), (5.0, LengthKnown("b", seven))]


def test_the_engine_is_slower_only_beside_a_prediction(kernel):
    slow = predictor(kernel)
    slow.predict(predict("a", 10))  # busy until 2.0
    assert slow.stretched(0.0, 0.5) == 1.0  # all of it beside the prediction
    assert slow.stretched(0.0, 3.0) == 4.0  # two seconds beside it do the work of one
    assert slow.stretched(1.0, 3.0) == 3.5
    assert slow.stretched(2.5, 3.0) == 3.0


def test_a_requests_prediction_is_the_same_whoever_asks_and_when(kernel):
    def named(seed, keys):
        noisy = predictor(kernel, COST, Rules(length="noisy", length_granularity=2), seed)
        return {key: noisy.predict(predict(key, 5)).length for key in keys}

    keys = [str(i) for i in range(30)]
    assert named(1, keys) == named(1, reversed(keys)) != named(2, keys)


def test_a_simulated_step_takes_what_the_cost_table_predicts(monkeypatch):
    """Steps of both phases, of several passes, cut short, and those that compute preempted requests again."""
    ratios, send = {"prefill": [], "decode": []}, Port.send

    def noted(port, peer, message):
        if isinstance(message, Heartbeat):
            for phase, found in ratios.items():
                found.append(getattr(message.step_ratio, phase))
        send(port, peer, message)

    monkeypatch.setattr(Port, "send", noted)
    monkeypatch.setattr(load_report, "LEAST", 1)
    monkeypatch.setattr(load_report, "MOST", 1)  # the last step, instead of a median
    cost = Cost(((1.0, 0.02), (512.0, 0.2)), ((1.0, 0.02), (16.0, 0.03)), 1e-7, 1e-6, kv_token_bytes=1000)
    small = {"kv_tokens": 1500, "chunk_tokens": 128, "max_batch": 32, "stream_interval": 8}
    setup = Setup(cost, mixed=1, heartbeat_s=0.02, **small)
    arrivals = drawn(25, TokenCounts.parsed("50-400"), TokenCounts.parsed("50-300"), seed=1, rate=20)
    assert World(setup, arrivals).run().counters["preempted"] > 5
    for found in ratios.values():
        known = [ratio for ratio in found if ratio is not None]
        assert len(known) > 100 and max(abs(ratio - 1.0) for ratio in known) < 1e-6


def test_after_a_hundred_requests_steps_take_what_is_predicted_although_the_table_is_of_another_machine(monkeypatch):
    """Prefill takes twice as long as it says, decode one and a half times. In between, the table is off by that."""
    table = Cost(((1.0, 0.02), (512.0, 0.2)), ((1.0, 0.02), (16.0, 0.03)), 1e-7, 1e-6, kv_token_bytes=1000)
    slower = Cost(((1.0, 0.04), (512.0, 0.4)), ((1.0, 0.03), (16.0, 0.045)), 2e-7, 1.5e-6)
    errors, compared = [], StepTimes.step_done

    def noted(times, done, seconds):
        sizes = [times.batch.running[each.key].size for each in done.tokens if each.key in times.batch.running]
        batch, context, cost = len(sizes), sum(sizes), times.cost
        run_s = cost.decode_run_s(batch, context, done.steps)
        predicted = cost.step_s(done.spans, batch, context) if done.spans else run_s
        if predicted:
            errors.append((len(arrived), abs(predicted / seconds - 1)))
        compared(times, done, seconds)

    arrived, assign = [], PrefillScheduler.assign
    monkeypatch.setattr(StepTimes, "step_done", noted)
    monkeypatch.setattr(PrefillScheduler, "assign", lambda self, *told: (arrived.append(told), assign(self, *told))[1])
    monkeypatch.setattr(
        instance, "Scripted", lambda capacity, _, *more, **ways: Scripted(capacity, slower, *more, **ways)
    )
    arrivals = drawn(150, TokenCounts.parsed("50-400"), TokenCounts.parsed("5-60"), seed=1, rate=5)
    World(Setup(table, mixed=2, heartbeat_s=0.2, kv_tokens=50000, chunk_tokens=512, max_batch=16), arrivals).run()
    begin = [error for count, error in errors if count < 3]
    then = [error for count, error in errors if count > 100]
    assert min(begin) > 0.3 and len(then) > 200 and max(then) < 0.05
