"""The tables in which policies are looked up by name."""

from dataclasses import asdict

from tetri.policy.rules import TABLES, Rules


def test_every_default_is_in_its_table_and_every_entry_is_named_after_its_function():
    assert all(name in TABLES[setting] for setting, name in asdict(Rules()).items())
    assert set(TABLES) == set(asdict(Rules()))
    assert all(entry.__name__ == name for table in TABLES.values() for name, entry in table.items())
