"""Pure functions: log-probs and a batch in, sums out."""
