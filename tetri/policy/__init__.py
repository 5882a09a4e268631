"""Policies: pure functions on snapshots. `rules` is the table in which their names are looked up."""
