"""Measures an engine and builds its cost table: `scenes` chooses what to run, `measure` times it, `fit` fits it."""
