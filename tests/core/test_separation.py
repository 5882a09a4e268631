"""Which adaptive instances keep to prefill: what is measured, and how long a decision holds."""

import pytest

from tetri.core.separation import HOLD_S, LEAST_S, WINDOW_S, Separation
from tetri.policy.keep import keep
from tetri.wire.load import Load

#: At each of four instances in a second.
SECOND = {"arrived": 3, "arrived_s": 0.5, "decodes": 3, "ended": 2, "ended_tokens": 60}


class Watched:
    """Four instances that are looked at every half second."""

    def __init__(self, *iids, **changes):
        self.separation, self.now, self.iids = Separation(), 0.0, list(iids or ("a0", "a1", "a2", "a3"))
        self.loads, self.changes = {}, changes
        self.arrived = 0.0

    def load(self, number):
        """One that decodes `number` requests, with little time between two tokens."""
        usual = {"free_blocks": 9, "running": 5 + number, "base_s": 0.05, "step_s": 0.06}
        usual |= {"context": 900, "kv_tokens": 4000}
        usual |= {"chunk_s": 0.3, "ttft_s": 2.0, "tpot_s": 0.07}
        counts = {name: each * self.arrived for name, each in SECOND.items()}
        counts = {name: each if name == "arrived_s" else int(each) for name, each in counts.items()}
        return Load(**{**usual, **counts, **self.changes})

    def look(self, seconds):
        for _ in range(round(2 * seconds)):
            self.loads = {iid: self.load(number) for number, iid in enumerate(self.iids)}
            found = self.separation.look(self.loads, self.now)
            self.now += 0.5
            self.arrived += 0.5
        return found


def test_before_there_is_a_load_to_judge_all_do_both():
    assert Watched().look(LEAST_S) == {}


def test_then_those_with_the_fewest_decodes_keep_to_prefill():
    watched = Watched()
    found = watched.look(LEAST_S + 2)
    assert found and [*found] == watched.iids[: len(found)] and {*found.values()} == {"prefill"}


def test_a_change_holds_for_some_seconds():
    watched = Watched()
    while not watched.look(0.5):
        assert watched.now < 60
    before = dict(watched.separation.kept)
    watched.changes = {"tpot_s": 9.0, "ttft_s": 900.0}  # now all limits are kept with ease
    assert [*watched.look(HOLD_S - 1)] == [*before]
    assert watched.look(2) == {}


def test_where_all_memory_holds_decodes_all_do_both():
    assert Watched(kv_tokens=1000).look(LEAST_S + 2) == {}


@pytest.mark.parametrize("lacks", ["tpot_s", "ttft_s", "ended_tokens", "decodes", "arrived_s", "base_s"])
def test_without_limits_outputs_or_a_cost_table_all_do_both(lacks):
    assert Watched(**{lacks: 0}).look(LEAST_S + 2) == {}


@pytest.mark.parametrize("chunk_s", [0.0, 0.02, 0.05])
def test_where_a_chunk_takes_no_longer_than_a_decode_step_there_is_a_decision_too(chunk_s):
    """Measured times may say so: each of the two is corrected by itself."""
    assert len(Watched(chunk_s=chunk_s).look(LEAST_S + 2)) < 4


def test_one_alone_does_both():
    assert Watched("a0").look(LEAST_S + 2) == {}


def test_when_others_go_one_at_least_decodes():
    watched = Watched()
    while len(watched.look(0.5)) < 2:
        assert watched.now < 60
    watched.iids = [*watched.separation.kept]
    assert len(watched.look(0.5)) < len(watched.iids)
    watched.iids = watched.iids[:1]
    assert watched.look(0.5) == {}
    watched.iids = []
    assert watched.look(0.5) == {}


def test_old_load_is_forgotten_and_a_restarted_instance_counts_from_zero():
    watched = Watched()
    assert watched.look(LEAST_S + 2)
    watched.changes = dict.fromkeys(SECOND, 0)  # they have restarted, and nothing arrives
    assert watched.look(1) and watched.look(WINDOW_S) == {}  # there is less and less in the window


def test_the_decision_is_the_policy_s(monkeypatch):
    asked = []
    monkeypatch.setattr("tetri.core.separation.keep", lambda load, now: asked.append(load) or keep(load, now))
    watched = Watched()
    watched.look(LEAST_S + 1.5)
    load = asked[-1]
    assert (load.instances, load.context, load.base_s) == (4, 3600, 0.05)
    assert load.prefill == pytest.approx(2.0, rel=0.05) and load.mean_s == pytest.approx(0.5 / 3, rel=0.05)
    assert load.requests == pytest.approx(12, rel=0.05) and load.output == pytest.approx(30)
    assert load.request_s == pytest.approx(0.04 / 26) and load.beside == pytest.approx(1 - 0.05 / 0.3)


@pytest.mark.parametrize("decodes, output", [(3, 30), (1.5, 15), (6, 60)])
def test_tokens_are_told_by_prompt_some_have_one_choice_some_none_that_decodes(monkeypatch, decodes, output):
    asked = []
    monkeypatch.setattr("tetri.core.separation.keep", lambda load, now: asked.append(load.output) or 0)
    monkeypatch.setitem(SECOND, "decodes", decodes)
    Watched().look(LEAST_S + 2)
    assert asked[-1] == pytest.approx(output, rel=0.05)
