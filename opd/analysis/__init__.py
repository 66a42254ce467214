"""What training changed in the weights, and how much of it rounding alone would show."""
