"""Asks held-out questions and grades the answers."""
