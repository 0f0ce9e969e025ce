"""Benchmarks with a known truth: how well a method does on data that was made for it."""
