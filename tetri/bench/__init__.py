"""Measurements: what drives a load, and what draws the outcome."""
