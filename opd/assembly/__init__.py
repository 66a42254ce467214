"""Config -> objects: the only place that chooses classes. Imported by workers only."""
