"""Benchmarks of the cache against the bare model, and against a bare read."""
