"""Which weights are trained: masks, how they are discovered and how two of them compare."""
