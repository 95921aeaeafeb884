"""Threads that run native code, and calls with a deadline."""
