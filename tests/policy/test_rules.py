"""The tables in which policies are looked up by name, and docs/policies.md held against them."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from tetri.policy.length import ENDS
from tetri.policy.rules import ORDERS, TABLES, Rules, order_of

DOCS = (Path(__file__).parent.parent.parent / "docs" / "policies.md").read_text()
ENDS_OF = {"dispatch_end", "admit_end"}


def documented(heading):
    """The first cells of the table rows below a heading, and which of them are marked as the default."""
    (section,) = (part for part in DOCS.split("\n### ") if part.startswith(heading))
    return {name: bool(star) for name, star in re.findall(r"^\| `(\w+)`( \*)? \|", section, re.MULTILINE)}


def test_every_default_is_in_its_table_and_every_entry_is_named_after_its_function():
    rules = asdict(Rules())
    assert all(rules[setting] in table for setting, table in TABLES.items() if setting != "flip")
    assert set(TABLES) - {"flip"} == {name for name, value in rules.items() if isinstance(value, str)} - ENDS_OF
    functions = {setting: dict(table) for setting, table in TABLES.items()}
    functions["order"] = {name: order.rank for name, order in ORDERS.items()}
    assert all(entry.__name__ == name for table in functions.values() for name, entry in table.items())
    assert {asdict(Rules())[setting] for setting in ENDS_OF} <= set(ENDS)


@pytest.mark.parametrize("setting", TABLES)
def test_every_policy_is_documented_and_so_is_the_default(setting):
    default = "none" if setting == "flip" else getattr(Rules(), setting)
    assert documented(f"`{setting}`") == {name: name == default for name in TABLES[setting]}


def test_only_adaptive_instances_compute_short_prompts_first_unless_told_so():
    assert order_of("adaptive", "auto") == ORDERS["adaptive"]
    assert all(order_of("adaptive", role) == ORDERS["fcfs"] for role in ("prefill", "decode", "mixed"))
    assert order_of("sjf", "auto") == order_of("sjf", "prefill") == ORDERS["sjf"]
