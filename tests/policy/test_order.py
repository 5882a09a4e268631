"""The order in which prompts are prefilled."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy.rules import ORDERS
from tetri.policy.views import QueuedPrompt

STRETCH = 4.0


def keys(name, window, stretch=STRETCH):
    return ORDERS[name].keys(window, stretch)


def test_first_come_first_served_and_age_outweighs_work():
    window = [QueuedPrompt("b", 2, 1), QueuedPrompt("a", 1, 900), QueuedPrompt("c", 3, 5)]
    assert keys("fcfs", window) == ["a", "b", "c"] and keys("fcfs", []) == []
    old_and_long = QueuedPrompt("long", 1, 900, since=0.0, work_s=2.0)
    assert keys("ageing", [QueuedPrompt("short", 2, 9, since=7.0, work_s=0.1), old_and_long]) == ["short", "long"]
    assert keys("ageing", [QueuedPrompt("short", 2, 9, since=8.1, work_s=0.1), old_and_long]) == ["long", "short"]
    assert keys("ageing", [QueuedPrompt("short", 2, 9, since=0.5, work_s=0.1), old_and_long], 0.0) == ["long", "short"]
    assert keys("ageing", [QueuedPrompt("b", 2, 9), QueuedPrompt("a", 1, 9)]) == ["a", "b"]


def test_by_length_and_among_equals_by_arrival():
    lengths = {"a": 900, "b": 7, "c": 5, "d": 7, "e": 1}
    window = [QueuedPrompt(key, arrival, tokens) for arrival, (key, tokens) in enumerate(lengths.items())]
    assert keys("sjf", window) == keys("sjf", window[::-1]) == list("ecbda")
    assert keys("ljf", window) == keys("ljf", window[::-1]) == list("abdce")


def test_the_earliest_deadline_first_and_without_one_by_age():
    window = [
        QueuedPrompt("late", 1, 9, since=0.0, work_s=1.0, due=9.0),
        QueuedPrompt("none", 2, 9, since=1.0, work_s=1.0),
        QueuedPrompt("early", 3, 900, since=2.0, work_s=9.0, due=4.0),
    ]
    assert keys("deadline", window) == ["early", "none", "late"]
    assert {name for name, order in ORDERS.items() if not order.windowed} == {"ageing", "deadline"}  # they bound waits


PROMPT = st.tuples(st.integers(0, 30), st.integers(1, 5), st.one_of(st.none(), st.integers(0, 9)))


@settings(deadline=None, derandomize=True)
@given(st.lists(PROMPT, min_size=1, max_size=25), st.integers(0, 8), st.sampled_from(["ageing", "deadline"]))
def test_nobody_waits_for_those_who_come_long_after_it(prompts, stretch, name):
    """One prompt at a time is prefilled, always the first of those that are there: no prompt without a deadline is
    overtaken by one that came more than `stretch` times its own work after it."""
    there = [
        QueuedPrompt(str(number), number, 9, float(since), float(work), None if slack is None else float(since + slack))
        for number, (since, work, slack) in enumerate(sorted(prompts, key=lambda prompt: prompt[0]))
    ]
    waiting, now, started = {prompt.key: prompt for prompt in there}, 0.0, []
    while waiting:
        here = [prompt for prompt in waiting.values() if prompt.since <= now]
        if not here:
            now = min(prompt.since for prompt in waiting.values())
            continue
        first = waiting.pop(keys(name, here, float(stretch))[0])
        started.append(first)
        now += first.work_s
    for place, prompt in enumerate(started):
        if prompt.due is None:
            assert all(prompt.since + stretch * prompt.work_s >= before.since for before in started[:place])


@settings(deadline=None, derandomize=True)
@given(st.lists(PROMPT, max_size=12), st.sampled_from(sorted(ORDERS)))
def test_an_order_keeps_everybody_and_is_the_same_however_they_stand(prompts, name):
    window = [
        QueuedPrompt(str(at), at, tokens, since, tokens / 3, due) for at, (since, tokens, due) in enumerate(prompts)
    ]
    assert sorted(keys(name, window)) == sorted(prompt.key for prompt in window)
    assert keys(name, window) == keys(name, window[::-1])
