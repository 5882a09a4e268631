"""Scheduling policies: pure functions on snapshots (views). `rules` maps policy names to functions."""
