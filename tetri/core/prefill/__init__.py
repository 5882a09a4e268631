"""The prefill phase of a worker: queue, chunks, choice of a decode instance, KV send."""
