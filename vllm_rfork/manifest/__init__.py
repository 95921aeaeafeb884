"""The tensor manifest and what it carries: plain data, no torch."""
