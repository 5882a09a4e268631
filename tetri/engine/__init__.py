"""Engines: what runs the model. `base` is the contract, `emulated` needs no model, `vllm` is the real one."""
