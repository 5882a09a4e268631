"""The worker's core: prefill and decode over one engine."""
