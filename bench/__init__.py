"""Benchmarks: ratios measured in one run, beside what a user would otherwise do and beside the machine's own rates."""
