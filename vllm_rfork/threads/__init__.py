"""Threads that run native code, and bounded waits for them."""
