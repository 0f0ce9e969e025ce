"""Edits of a model: what a feature or a direction builds, and `lm.steer` takes."""
