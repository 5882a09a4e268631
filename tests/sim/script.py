"""A core that does what it was told beforehand."""

from types import SimpleNamespace

from tetri.cost import Cost
from tetri.instance import Capacity
from tetri.policy.rules import Rules

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
        return float("-inf") if self.next else self.due
