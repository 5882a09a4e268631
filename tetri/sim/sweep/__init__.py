"""The sweep: how many requests a second each arrangement of instances serves within limits of latency."""
