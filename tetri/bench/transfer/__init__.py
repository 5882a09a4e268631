"""bench_transfer: bandwidth of the KV paths."""
