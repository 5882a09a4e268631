"""chaos: traffic under injected faults, every answer checked."""
