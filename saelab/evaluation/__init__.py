"""Measuring an SAE on held-out text."""

from saelab.evaluation.crosscoder import compare_decoders, latent_scaling
from saelab.evaluation.report import Report, evaluate

__all__ = ["Report", "compare_decoders", "evaluate", "latent_scaling"]
