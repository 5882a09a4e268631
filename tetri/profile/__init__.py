"""From a real engine to a cost table: `scenes` says what is run, `measure` runs it, `fit` finds the table."""
