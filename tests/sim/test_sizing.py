"""The sizing: the deployment that it names reaches the goal, and one instance fewer does not."""

from dataclasses import replace
from math import inf

import pytest

from tetri import cost
from tetri.cost import Cost
from tetri.sim import pools, sizing
from tetri.sim.pools import Demand, Goal, sampled
from tetri.sim.setup import Setup
from tetri.sim.sizing import SizingError, checked, size
from tetri.sim.traces import TokenCounts

V100 = Setup(cost.load("v100-opt13b"), link_bytes_s=25e9)
CPU = Setup(cost.load("cpu-smollm2"), chunk_tokens=512, max_batch=32)
TABLE = Cost(prefill=((0.0, 0.0), (100.0, 1.0)), decode=((1.0, 0.1), (101.0, 1.1)))
SETUP = Setup(TABLE, kv_tokens=16_000, chunk_tokens=100, max_batch=50)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(pools, "REQUESTS", 600)
    monkeypatch.setattr(pools, "LONGER", (1,))


def demand(goal, setup, prompt="200", output="11", seed=0):
    return Demand(goal, setup, sampled(TokenCounts.parsed(prompt), TokenCounts.parsed(output), 0), seed)


@pytest.mark.parametrize(
    ("setup", "goal", "prompt", "output"),
    [
        (V100, Goal(40, 0.27, 0.052), "300", "50"),
        (V100, Goal(13, 0.45, 0.039), "100-900", "16"),
        (CPU, Goal(8, 0.24, 0.0535), "200-400", "10-30"),
    ],
)
def test_the_live_cores_reach_the_goal_and_with_one_instance_fewer_they_do_not(setup, goal, prompt, output):
    """The limits lie between the times with enough and with one fewer, so that chance decides nothing."""
    found = size(demand(goal, setup, prompt, output))
    made = checked(demand(goal, setup, prompt, output, seed=1), found, requests=300)
    counts = found.prefill.enough.instances, found.decode.enough.instances
    assert (made[0].prefill, made[0].decode) == counts and len(made) == 3
    assert [each.reached for each in made] == [each.expected for each in made] == [True, False, False]


def test_what_is_enough_and_what_one_fewer_does():
    goal = Goal(2.0, 10.0, 0.11)
    found = size(demand(goal, SETUP))
    for answer in (found.prefill, found.decode, found.coupled):
        assert answer.enough.reaches(goal) and not answer.fewer.reaches(goal)
        assert answer.fewer.instances == answer.enough.instances - 1
    assert (found.prefill.bound, found.prefill.fewer.ttft_s) == ("compute", inf)
    assert found.decode.bound == "tpot" and found.prefill.enough.instances == 5
    assert found.coupled.enough.instances > 4  # of which four would compute prompts only


def test_tight_limits_of_prefill_are_ttft():
    answer = size(demand(Goal(2.0, 2.1, 0.15), SETUP)).prefill
    assert answer.bound == "ttft" and answer.enough.instances > 5 and 2.1 < answer.fewer.ttft_s < inf


def test_a_small_load_needs_one_of_each():
    found = size(demand(Goal(0.1, 10.0, 1.0), SETUP))
    for answer in (found.prefill, found.decode, found.coupled):
        assert answer.enough.instances == 1 and answer.fewer is None
    assert checked(demand(Goal(0.1, 10.0, 1.0), SETUP, seed=1), found, requests=10)[0].reached


def test_a_guess_that_is_too_high_is_lowered():
    """Half of the prompts have almost no output, so that memory never holds what the mean says."""
    goal = Goal(1.0, 20.0, 0.12, share=0.3)
    found = size(demand(goal, SETUP, output="2-100"))
    assert found.decode.enough.reaches(goal) and not found.decode.fewer.reaches(goal)


@pytest.mark.parametrize(
    ("goal", "setup", "says"),
    [
        (Goal(1, 1.9, 1.0), SETUP, "ttft 1.9 s: the prefill of a request alone takes 2.001 s"),
        (Goal(1, 5.0, 0.05), SETUP, "tpot 0.05 s: a token of a request alone takes 0.1001 s"),
        (Goal(1, 5.0, 1.0), replace(SETUP, kv_tokens=208), "a request of 211 tokens is longer than the 208 that"),
        (Goal(1, 5.0, 1.0), replace(SETUP, context=200), "a request of 211 tokens is longer than the 200 that"),
        (Goal(1e5, 5.0, 1.0), SETUP, "more than 2000 instances of a role are needed"),
    ],
)
def test_limits_that_no_number_of_instances_reaches(goal, setup, says):
    with pytest.raises(SizingError) as error:
        size(demand(goal, setup))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_memory_for_exactly_one_request_is_enough():
    """A decode step that only fetches KV takes no memory."""
    setup = replace(SETUP, kv_tokens=224, link_bytes_s=1e9)
    for output in ("24", "2"):
        found = size(
            demand(Goal(0.1, 10.0, 10.0), replace(setup, cost=replace(TABLE, kv_token_bytes=1)), "200", output)
        )
        assert found.decode.enough.instances == 1
    with pytest.raises(SizingError, match="a request of 225 tokens is longer than the 224"):
        size(demand(Goal(0.1, 10.0, 10.0), setup, "200", "25"))


def test_prompts_in_one_chunk_are_at_most_max_batch():
    """So that short prompts, each in a chunk of its own, need more instances."""
    found = [size(demand(Goal(50, 0.3, 0.15), replace(V100, max_batch=most), "100", "2")) for most in (32, 1)]
    packed, alone = (each.prefill.enough.instances for each in found)
    assert packed < alone


def test_of_requests_that_vary_only_the_share_counts():
    goal = Goal(0.1, 1.5, 1.0)
    with pytest.raises(SizingError, match="of 90 % of the requests alone takes"):
        size(demand(goal, SETUP, prompt="100-200"))
    assert size(demand(replace(goal, share=0.3), SETUP, prompt="100-200")).prefill.enough.instances >= 1


def test_coupled_instances_may_not_be_able_to(monkeypatch):
    """Their steps wait for chunks."""
    monkeypatch.setattr(sizing, "MOST", 5)
    made = size(demand(Goal(1.0, 4.0, 0.12), SETUP))
    assert made.coupled is None and made.prefill.enough.instances <= 5
