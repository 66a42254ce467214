"""Rollout engines: vLLM in this process or behind HTTP, transformers, a data set."""
