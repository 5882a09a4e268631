"""chaos: send requests while faults are injected, and check every answer."""
