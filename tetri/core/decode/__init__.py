"""The decode phase of a worker: memory reservations, KV receive, admission, the running batch."""
