"""Config -> objects: the only place that chooses a class. Imported by workers only."""
