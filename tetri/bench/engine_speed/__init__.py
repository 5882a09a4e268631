"""tools/bench_engine: engine steps beside what memory and arithmetic allow, and beside vLLM called in a loop."""
