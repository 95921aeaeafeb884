"""What enters the fingerprint of a worker, and what is ignored, with the reason."""
