"""Masks of the weights that are trained: discovery, files, set operations and comparison."""
