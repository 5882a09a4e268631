"""bench_transfer: measure the bandwidth of the KV paths."""
