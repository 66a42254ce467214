"""A trained subnetwork as a small file: sparse checkpoints, and adapters made of them."""
