"""Benchmarks: ratios to the default loader and to the machine's own rates, measured in one run."""
