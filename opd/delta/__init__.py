"""Sparse checkpoints: a trained subnetwork as a small file, and adapters made from it."""
