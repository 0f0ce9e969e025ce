"""Measuring an SAE on held-out text."""

from saelab.evaluation.report import Report, evaluate

__all__ = ["Report", "evaluate"]
