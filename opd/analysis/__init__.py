"""Analysis of what training changed in the weights, beside what rounding alone would show."""
