"""Which weights may learn: masks, how they are discovered and how two of them compare."""
