"""Trackers: run files, the terminal, Weights & Biases; and the reports made from the run files."""
