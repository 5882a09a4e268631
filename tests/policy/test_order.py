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
    assert {name for name, order in ORDERS.items() if not order.windowed} == {"adaptive", "ageing", "deadline"}


PROMPT = st.tuples(st.integers(0, 30), st.integers(1, 5), st.one_of(st.none(), st.integers(0, 9)))


@settings(deadline=None, derandomize=True)
@given(st.lists(PROMPT, max_size=12), st.sampled_from(sorted(ORDERS)))
def test_an_order_keeps_everybody_and_is_the_same_however_they_stand(prompts, name):
    window = [
        QueuedPrompt(str(at), at, tokens, since, tokens / 3, due) for at, (since, tokens, due) in enumerate(prompts)
    ]
    assert sorted(keys(name, window)) == sorted(prompt.key for prompt in window)
    assert keys(name, window) == keys(name, window[::-1])
