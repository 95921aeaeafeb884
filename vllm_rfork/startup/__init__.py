"""The caches of one start: taken from the seed of a fork, reported after warm-up, and offered to later receivers."""
