"""Prompts: read from data sets, tokenised, and ordered for training."""
