"""A run from the outside: recipe, checks, launch, worker, run folder, study; callable from Python."""
