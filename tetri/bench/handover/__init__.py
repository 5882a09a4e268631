"""bench_handover: measure the time from the end of prefill to the first decode step."""
