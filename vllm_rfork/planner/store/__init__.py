"""The fleet's state and every decision on it; in memory, or written through to Redis."""
