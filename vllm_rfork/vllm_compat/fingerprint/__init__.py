"""The facts that enter a worker's fingerprint, and those that are ignored, with the reason."""
