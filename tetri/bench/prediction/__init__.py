"""bench_prediction: simulate how much output length prediction helps."""
