"""bench_overhead: the live system against plain vLLM."""
