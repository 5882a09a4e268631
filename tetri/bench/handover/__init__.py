"""bench_handover: from the end of prefill to the first decode step."""
