"""Tests of the cores, in the order of their sources."""
