"""The tables in which policies are looked up by name."""

from dataclasses import asdict

from tetri.policy.length import ENDS
from tetri.policy.rules import ORDERS, TABLES, Rules


def test_every_default_is_in_its_table_and_every_entry_is_named_after_its_function():
    rules = asdict(Rules())
    assert all(rules[setting] in table for setting, table in TABLES.items() if setting != "flip")
    assert set(TABLES) - {"flip"} == {name for name, value in rules.items() if isinstance(value, str)} - _ENDS
    functions = {setting: dict(table) for setting, table in TABLES.items()}
    functions["order"] = {name: order.rank for name, order in ORDERS.items()}
    assert all(entry.__name__ == name for table in functions.values() for name, entry in table.items())


def test_ends_are_names_of_ends():
    assert {asdict(Rules())[setting] for setting in _ENDS} <= set(ENDS)


_ENDS = {"dispatch_end", "admit_end"}
