"""Virtual processes: the loop around a core, and a worker whose run of several passes is cut short."""

from types import SimpleNamespace

import pytest

from tetri.core.actions import AddRequest, AdmitRequest, LengthKnown, Predict, Publish, Send, Step
from tetri.cost import Cost
from tetri.engine_request import EngineRequest, StepDone
from tetri.policy.rules import Rules
from tetri.request import Capacity, LengthRange, Sampling
from tetri.sim.instance import PlainWorker, SimulatedPredictor, Use
from tetri.sim.kernel import Kernel
from tetri.sim.links import Port, Wiring
from tetri.sim.nodes import MonitorNode
from tetri.wire.messages import ClusterView, Load, LoadReport

COST = Cost(prefill=((1.0, 0.5),), decode=((1.0, 0.1), (2.0, 0.2)))


class Script:
    """A core that does what it was told beforehand and writes down what it hears. `due`: its deadline."""

    def __init__(self, cost=COST):
        capacity = Capacity(blocks=100, block_tokens=4, chunk_tokens=16, max_batch=8, context=400)
        instance = SimpleNamespace(role="decode", fingerprint=SimpleNamespace(block_bytes=0))
        rules = Rules(length="oracle")
        self.own = SimpleNamespace(iid="w", instance=instance, capacity=capacity, cost=cost, rules=rules, expected=None)
        self.heard, self.ticks = [], []
        self.due = None
        self.answers, self.next = {}, []

    def handle(self, event, now):
        self.heard.append((now, event))
        return self.answers.pop(event, []) if isinstance(event, str) else []

    def tick(self, now):
        self.ticks.append(now)
        if self.due is not None and self.due <= now:
            self.due = None
        actions, self.next = self.next, []
        return actions

    def deadline(self):
        return self.due


@pytest.fixture
def kernel():
    return Kernel()


def monitor(kernel):
    core = Script()
    return core, MonitorNode(kernel, core, Port(Wiring(kernel, 0.0), "monitor"))


def test_what_arrives_at_one_moment_is_read_in_one_turn(kernel):
    core, node = monitor(kernel)
    for event in ("a", "b"):
        kernel.at(1.0, node.receive, event)
    kernel.run()
    assert core.heard == [(1.0, "a"), (1.0, "b")] and core.ticks == [1.0]


def test_the_loop_wakes_at_the_cores_deadline(kernel):
    core, node = monitor(kernel)
    core.due = 2.0
    node.start()
    kernel.at(1.0, node.receive, "early")
    kernel.run()
    assert core.ticks == [0.0, 1.0, 2.0]


def test_a_deadline_that_moved_is_kept_in_its_new_place(kernel):
    core, node = monitor(kernel)
    core.due = 1.0
    node.start()
    core.due = 3.0
    kernel.run()
    assert core.ticks == [0.0, 3.0]


def test_it_publishes_and_sends(kernel):
    core, node = monitor(kernel)
    heard = []
    hearer = SimpleNamespace(name="x", receive=heard.append)
    node.port.wiring.processes |= {"x": hearer, "monitor": node}
    node.port.wiring.subscribers["monitor"] = [hearer]
    node.port.connect("x", "x")
    kernel.run()
    core.answers["go"] = [Publish("view"), Send("x", "wish")]
    node.receive("go")
    kernel.run()
    assert heard == ["view", "wish"]


def worker(kernel, cost=COST):
    core = Script(cost)
    node = PlainWorker(kernel, core, Port(Wiring(kernel, 0.0), "w"), float("inf"), 0)
    return core, node


def decoding(core, node, tokens=100):
    """A worker whose engine runs one decode, and is about to make up to 10 passes."""
    engine_request = EngineRequest("d", "decode", (1, 1, 1, 1), 4, Sampling(max_tokens=tokens, ignore_eos=True))
    core.next = [AddRequest(engine_request), Step()]
    node.start()
    core.next = [AdmitRequest("d", 1), Step(10)]


def steps(core):
    return [(now, event.steps) for now, event in core.heard if isinstance(event, StepDone)]


def test_a_run_that_nobody_disturbs_makes_all_its_passes(kernel):
    core, node = worker(kernel)
    decoding(core, node)
    kernel.at(1.0, node.receive, "begin")
    kernel.run()
    assert steps(core)[1:] == [(pytest.approx(2.0), 10)]
    assert node.use.decode_tokens == 10 and node.use.busy_s == {"decode": pytest.approx(1.0)}


def test_a_message_ends_a_run_after_the_pass_under_way_and_is_read_then(kernel):
    core, node = worker(kernel)
    decoding(core, node)
    kernel.at(1.0, node.receive, "begin")
    kernel.at(1.25, node.receive, "first")
    kernel.at(1.28, node.receive, "second")
    kernel.run()
    assert steps(core)[1:] == [(pytest.approx(1.3), 3)]
    assert [event for _, event in core.heard[-2:]] == ["first", "second"]
    assert core.heard[-1][0] == pytest.approx(1.3)
    assert node.use.decode_tokens == 3


def test_a_view_ends_no_run_and_is_read_after_it(kernel):
    core, node = worker(kernel)
    decoding(core, node)
    kernel.at(1.0, node.receive, "begin")
    view = ClusterView(epoch=1, number=1, loads=[])
    kernel.at(1.25, node.receive, view)
    kernel.run()
    assert steps(core)[1:] == [(pytest.approx(2.0), 10)] and core.heard[-1][1] == view


def test_a_message_during_the_last_pass_changes_nothing(kernel):
    core, node = worker(kernel)
    decoding(core, node)
    kernel.at(1.0, node.receive, "begin")
    kernel.at(1.95, node.receive, "late")
    kernel.run()
    assert steps(core)[1:] == [(pytest.approx(2.0), 10)]


def test_a_length_that_was_named_during_a_step_is_told_before_it(kernel):
    core, node = worker(kernel)
    decoding(core, node)
    kernel.at(1.0, node.receive, "begin")
    named = LengthKnown("d", LengthRange(low=7, high=8))
    for event in ("before", named, "after"):
        kernel.at(1.25, node.receive, event)
    kernel.run()
    assert [event for _, event in core.heard if not isinstance(event, str)][1] == named
    assert core.heard[-4:] == [(1.3, named), core.heard[-3], (1.3, "before"), (1.3, "after")]


def test_while_the_engine_computes_no_timer_fires(kernel):
    core, node = worker(kernel)
    decoding(core, node)
    kernel.at(1.0, node.receive, "begin")
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


def test_a_change_of_role_is_noted_once():
    kernel = Kernel()
    core, node = worker(kernel)
    core.answers = {event: [Publish(report(role))] for event, role in (("a", "decode"), ("b", "mixed"), ("c", "mixed"))}
    for when, event in enumerate("abc"):
        kernel.at(when, node.receive, event)
    kernel.run()
    assert node.use.roles == [(0.0, "decode"), (1, "mixed")]


def report(role):
    return LoadReport(iid="w", incarnation=1, role=role, load=Load(free_blocks=1))


def test_use_joins_spans_that_touch_and_are_alike():
    use = Use(spans=[])
    for start, stop, what in ((0, 1, "prefill"), (1, 2, "prefill"), (2, 3, "decode"), (4, 5, "decode")):
        use.add(start, stop, what)
    assert use.spans == [(0, 2, "prefill"), (2, 3, "decode"), (4, 5, "decode")]
    assert (use.first_s, use.last_s, use.busy_s) == (0, 5, {"prefill": 2, "decode": 2})


# ---------------------------------------------------------------- the predictor


SLOW = Cost(prefill=COST.prefill, decode=COST.decode, predictor_s=1.0, predictor_token_s=0.1, predictor_slowdown=2.0)


def predict(key, tokens):
    return Predict(key, (1,) * tokens, Sampling(max_tokens=7, ignore_eos=True))


def test_predictions_run_one_after_the_other(kernel):
    heard = []
    own = SimpleNamespace(rules=Rules(length="oracle"), cost=SLOW)
    predictor = SimulatedPredictor(kernel, own, 0, lambda event: heard.append((kernel.now, event)))
    assert predictor.predict(predict("a", 10)) is None
    assert predictor.predict(predict("b", 20)) is None
    kernel.run()
    seven = LengthRange(low=7, high=8)
    assert heard == [(2.0, LengthKnown("a", seven)), (5.0, LengthKnown("b", seven))]


def test_a_prediction_that_costs_nothing_is_there_at_once(kernel):
    own = SimpleNamespace(rules=Rules(length="oracle"), cost=COST)
    predictor = SimulatedPredictor(kernel, own, 0, print)
    assert predictor.predict(predict("a", 10)) == LengthKnown("a", LengthRange(low=7, high=8))
    assert predictor.stretched(0.0, 1.0) == 1.0


def test_the_engine_is_slower_only_beside_a_prediction(kernel):
    predictor = SimulatedPredictor(
        kernel, SimpleNamespace(rules=Rules(length="oracle"), cost=SLOW), 0, lambda event: None
    )
    predictor.predict(predict("a", 10))  # busy until 2.0
    assert predictor.stretched(0.0, 0.5) == 1.0  # all of it beside the prediction
    assert predictor.stretched(0.0, 3.0) == 4.0  # two seconds beside it do the work of one
    assert predictor.stretched(1.0, 3.0) == 3.5
    assert predictor.stretched(2.0, 3.0) == 3.0


def test_a_requests_prediction_is_the_same_whoever_asks_and_when(kernel):
    def named(seed, keys):
        own = SimpleNamespace(rules=Rules(length="noisy", length_granularity=2), cost=COST)
        predictor = SimulatedPredictor(kernel, own, seed, print)
        return {key: predictor.predict(predict(key, 5)).length for key in keys}

    keys = [str(i) for i in range(30)]
    assert named(1, keys) == named(1, reversed(keys)) != named(2, keys)
