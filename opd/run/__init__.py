"""One run from the outside: recipe, checks, launch, worker, folder, study; callable from Python."""
