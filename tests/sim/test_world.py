"""The simulator as a whole: by hand computed runs, conservation, and that it has no scheduler of its own."""

from dataclasses import replace

import pytest

from tetri.core.prefill.scheduler import PrefillScheduler
from tetri.cost import Cost
from tetri.policy.rules import ADMISSIONS, ORDERS, Rules
from tetri.policy.views import FlipSettings
from tetri.sim.setup import Setup, SimError
from tetri.sim.traces import Arrival, TokenCounts, drawn
from tetri.sim.world import World

L = 0.001  # seconds that a message takes
CHUNK_S, STEP_S, TWO_S = 0.1, 0.02, 0.03
COST = Cost(prefill=((1.0, CHUNK_S), (512.0, CHUNK_S)), decode=((1.0, STEP_S), (2.0, TWO_S)), kv_token_bytes=1000)
SETUP = Setup(COST, kv_tokens=16_000, link_latency_s=L, chunk_tokens=512)
ONE = Arrival(0.0, 300, 5)
BLOCKS = 19  # of 300 tokens


def outcome(setup, *arrivals):
    return World(setup, arrivals).run().outcomes[-1]


# ---------------------------------------------------------------- computed by hand
# L: Assign. CHUNK_S: prefill. L: the first token's way to the broker, and at the same time the chunk's to the decode
# instance, which has granted meanwhile. Then four passes, and L for the last token.


def test_one_request_on_one_instance_of_each_kind():
    made = outcome(SETUP, ONE)
    assert made.tpot_s == pytest.approx((L + 4 * STEP_S) / 4)
    assert (made.state, made.prefill, made.decode, made.attempts) == ("done", "p0", "d0", 1)


def test_a_request_of_one_token_never_sees_a_decode_instance():
    made = outcome(SETUP, Arrival(0.0, 300, 1))
    assert made.ttft_s == made.jct_s == pytest.approx(2 * L + CHUNK_S)
    assert made.tpot_s is None and made.decode is None


FOUR_S = 4 * STEP_S
BLOCK_S = 16_000 / 1e7  # of KV on a slow link
SLOW = {"link_bytes_s": 1e7}
HOME = {"prefill": 0, "decode": 0, "mixed": 1, "link_bytes_s": 1.0}
AUTO = HOME | {"mixed": 0, "auto": 1}
TWO = SLOW | {"chunk_tokens": 200, "max_batch": 10}  # chunks: the first 200 of the 300 tokens fill 12 blocks


def predicted(predictor_s, slowdown=1.0, **rules):
    cost = replace(COST, predictor_s=predictor_s, predictor_slowdown=slowdown)
    return {"cost": cost, "rules": Rules(length="oracle", **rules)}


@pytest.mark.parametrize(
    ("changes", "prefill", "after"),
    [
        ({}, CHUNK_S, FOUR_S),
        (SLOW, CHUNK_S, BLOCKS * BLOCK_S + FOUR_S),
        (TWO, 2 * CHUNK_S, (BLOCKS - 12) * BLOCK_S + FOUR_S),  # only the last chunk's KV is waited for
        (TWO | {"transfer": "request"}, 2 * CHUNK_S, BLOCKS * BLOCK_S + FOUR_S),
        # no KV is moved, and nobody is told of it
        (HOME, CHUNK_S, FOUR_S - L),
        (AUTO, CHUNK_S, FOUR_S - L),
        (HOME | {"chunk_tokens": 200, "max_batch": 10}, 2 * CHUNK_S, FOUR_S - L),
        (HOME | {"kv_tokens": 512, "slots": 33}, CHUNK_S, FOUR_S - L),  # memory and slots for one prompt, not for two
        (HOME | predicted(CHUNK_S / 2, 1.0), CHUNK_S, FOUR_S - L),  # placed after its prefill: copied, in no time
        (HOME | predicted(CHUNK_S / 2, 1.0) | {"chunk_tokens": 200, "max_batch": 10}, 2 * CHUNK_S, FOUR_S - L),
        # The predictor runs for half of CHUNK_S, in which the main model does the work of a quarter.
        (predicted(CHUNK_S / 2, 2.0), CHUNK_S * 1.25, FOUR_S),
        # A prompt is on offer at its end at the latest; its KV leaves with the Offer.
        (predicted(3.0), CHUNK_S, FOUR_S),
        # The first chunk's KV moves beside the second chunk, or after it when the offer has waited too long.
        (TWO | predicted(3.0, length_wait_s=CHUNK_S / 2), 2 * CHUNK_S, (BLOCKS - 12) * BLOCK_S + FOUR_S),
        (TWO | predicted(3.0, length_wait_s=10.0), 2 * CHUNK_S, BLOCKS * BLOCK_S + FOUR_S),
    ],
)
def test_the_times_of_one_request(changes, prefill, after):
    result = World(replace(SETUP, **changes), [ONE]).run()
    made, moved = result.outcomes[0], BLOCKS * 16_000 if changes.get("prefill", 1) else 0
    assert result.counters["moved_bytes"] == moved
    assert (made.ttft_s, made.jct_s) == (pytest.approx(2 * L + prefill), pytest.approx(3 * L + prefill + after))


def test_nobody_takes_the_role_of_who_computes_long():
    """Silent for a step of 10 s, an instance would be gone for a live monitor, and its role another's."""
    slow = replace(SETUP, cost=replace(COST, prefill=((1.0, 10.0), (512.0, 10.0))))
    made = World(slow, [Arrival(0.0, 512, 5), Arrival(8.0, 512, 5)]).run()
    assert [[role for _, role in use.roles] for use in made.instances.values()] == [["prefill"], ["decode"]]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_choices_share_one_prefill_and_one_transfer_and_decode_as_a_batch_of_so_many(n):
    setup = replace(SETUP, max_batch=10, link_bytes_s=1e7)
    result = World(setup, [Arrival(0.0, 300, 5, n=n)]).run()
    made, counters = result.outcomes[0], result.counters
    assert counters["moved_bytes"] == BLOCKS * 16_000
    assert (counters["prefill_tokens"], counters["decode_tokens"], counters["steps"]) == (300, 4 * n, 5)
    step_s = STEP_S + (n - 1) * (TWO_S - STEP_S)
    assert made.ttft_s == pytest.approx(2 * L + CHUNK_S)
    assert made.jct_s == pytest.approx(3 * L + CHUNK_S + BLOCKS * BLOCK_S + 4 * step_s)


def test_two_requests_share_the_batch():
    """Both have 9 passes to make. The second's KV lands during the first's fifth: four they share, and the second
    makes its last five alone."""
    cost = replace(COST, prefill=((1.0, 0.09),))
    setup = replace(SETUP, cost=cost, chunk_tokens=300, max_batch=10)
    first, second = World(setup, [Arrival(0.0, 300, 10), Arrival(0.0, 300, 10)]).run().outcomes
    assert first.ttft_s == pytest.approx(2 * L + 0.09) and second.ttft_s == pytest.approx(2 * L + 0.18)
    shared_until = 2 * L + 0.09 + 5 * STEP_S + 4 * TWO_S
    assert first.jct_s == pytest.approx(shared_until + L)
    assert second.jct_s == pytest.approx(shared_until + 5 * STEP_S + L)


def test_two_requests_share_an_instance_that_does_both():
    """The first decodes beside the chunk of the second, then both together, and the second's last pass is alone. No
    step waits for KV, and none of it moves."""
    setup = replace(SETUP, chunk_tokens=300, max_batch=10, **HOME)
    result = World(setup, [Arrival(0.0, 300, 3), Arrival(0.0, 299, 3)]).run()
    first, second = result.outcomes
    assert first.ttft_s == pytest.approx(2 * L + CHUNK_S) and second.ttft_s == pytest.approx(2 * L + 2 * CHUNK_S)
    assert first.jct_s == pytest.approx(2 * L + 2 * CHUNK_S + TWO_S)
    assert second.jct_s == pytest.approx(2 * L + 2 * CHUNK_S + TWO_S + STEP_S)
    assert result.counters["moved_bytes"] == 0


# ---------------------------------------------------------------- many requests


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefill": 2, "decode": 3, "rules": Rules(length="noisy", order="sjf", admit="reserve_dynamic")},
        {"prefill": 1, "decode": 1, "mixed": 1, "rules": Rules(length="oracle")},
        {"mixed": 2, "prefill": 0, "decode": 0, "rules": Rules(order="ageing", length="noisy")},
        {"transfer": "request", "link_bytes_s": 1e8},
        {"slots": 40, "link_bytes_s": 1e7},
        {"prefill": 2, "decode": 2, "flip": "idle", "flip_settings": FlipSettings(idle_s=0.2, hold_s=0.5)},
        {"prefill": 2, "decode": 2, "flip": "balance", "flip_settings": FlipSettings(hold_s=0.2, gain=1.1)},
        {"stream_interval": 1, "heartbeat_s": 0.2},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_what_goes_in_comes_out_and_everything_is_given_back(changes):
    """`run` checks the tokens, the blocks, the slots, the rows and every core at the end."""
    lengths = (TokenCounts.parsed(text) for text in ("lognormal:200:1", "lognormal:60:0.8"))
    result = World(replace(SETUP, **changes), drawn(60, *lengths, seed=1, rate=40.0)).run()
    assert [each.state for each in result.outcomes] == ["done"] * 60
    assert result.counters["prefill_tokens"] == sum(each.arrival.prompt for each in result.outcomes)
    for each in result.outcomes:
        assert 0 < each.ttft_s <= each.jct_s


@pytest.mark.parametrize("admit", [*ADMISSIONS])
def test_memory_that_binds_is_given_back_too(admit):
    """Some three requests fit at their ends. Greedy preempts; with true lengths, peak never does."""
    setup = replace(SETUP, kv_tokens=2000, rules=Rules(length="oracle", admit=admit), reserve_share=1.0)
    result = World(setup, drawn(40, TokenCounts.parsed("100"), TokenCounts.parsed("300-700"), 1)).run()
    assert {each.state for each in result.outcomes} == {"done"}
    assert result.counters["preempted"] > 0 or admit != "greedy"
    assert result.counters["preempted"] == 0 or admit != "peak"


def test_a_request_that_cannot_fit_is_refused_and_counted():
    result = World(SETUP, [ONE, Arrival(0.0, 15_990, 100), Arrival(0.5, 10, 2)]).run()
    assert [each.state for each in result.outcomes] == ["done", "refused", "done"]
    assert "context" in result.outcomes[1].why


def test_a_deadline_ends_a_request():
    result = World(SETUP, [Arrival(0.0, 300, 5000, deadline_s=1.0), ONE]).run()
    assert [each.state for each in result.outcomes] == ["failed", "done"]
    assert result.outcomes[0].why == "deadline" and result.outcomes[0].jct_s == pytest.approx(1.0)


def test_a_flip_shows_in_what_an_instance_was():
    """The second prefill instance has nothing to do, so the watcher lets it decode."""
    settings = FlipSettings(idle_s=0.5, hold_s=0.5)
    setup = replace(SETUP, prefill=2, decode=1, flip="idle", flip_settings=settings)
    result = World(setup, [Arrival(0.2 * i, 100, 30) for i in range(50)]).run()
    roles = [[role for _, role in use.roles][:2] for use in result.instances.values()]
    assert ["prefill", "decode"] in roles


# ---------------------------------------------------------------- no second scheduler


def test_without_the_prefill_core_nobody_is_served(monkeypatch):
    monkeypatch.setattr(PrefillScheduler, "plan", lambda self, *arguments: [])
    with pytest.raises(SimError, match="1 requests are not served: for 600 s no engine computed"):
        World(SETUP, [ONE]).run()


def test_another_order_in_the_policy_table_is_another_order_in_the_simulator(monkeypatch):
    short, long = Arrival(0.0, 100, 2), Arrival(0.0, 2000, 2)

    def ttft(order):
        made = World(replace(SETUP, rules=Rules(order=order)), [long, short]).run().outcomes
        return [each.ttft_s for each in made]

    assert ttft("fcfs")[0] < ttft("fcfs")[1] and ttft("sjf")[0] > ttft("sjf")[1]
    monkeypatch.setitem(ORDERS, "sjf", ORDERS["fcfs"])
    assert ttft("sjf") == ttft("fcfs")


def test_a_run_that_is_stopped_leaves_requests_open():
    world = World(SETUP, [ONE, replace(ONE, at_s=0.1), replace(ONE, at_s=9.0)], lambda answered: world.stop())
    assert [each.state for each in world.run().outcomes] == ["done", "open"]
