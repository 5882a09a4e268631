"""bench_overhead: compare the live system with plain vLLM."""
