"""Benchmarks that compare the SAE variants, on synthetic data with known features and on a model's activations."""
