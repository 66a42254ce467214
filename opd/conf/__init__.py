"""Hydra defaults lists, shipped as package data."""
