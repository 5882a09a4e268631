"""The vLLM engine, and the parts that vLLM loads: scheduler, KV connector, sampler."""
