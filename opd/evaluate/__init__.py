"""Evaluation on held-out prompts: accuracy, mean@k, pass@k, divergence; graders and rewards."""
