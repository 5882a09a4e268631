"""Engines run the model: `base` is the contract, `emulated` an engine without a model, `vllm` the real one."""
