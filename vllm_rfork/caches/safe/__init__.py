"""JSON caches: each is parsed, checked against its schema and bounds, and encoded again by the worker that uses it."""
