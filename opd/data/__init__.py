"""Prompts: where they come from, and in which order a run asks for them."""
