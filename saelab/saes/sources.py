"""Rows of several sources (layers of a model, or models), as crosscoders and cross-layer transcoders read them."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from saelab.saes.inputs import as_activations


def by_source(x: Any, n_sources: int, d: int, what: str) -> Float[Tensor, "token source d"]:
    """Raw activations `(n, n_sources, d)`, or `(n, d)` of a single source, with an axis of sources.

    Raises `ValueError` for another shape, naming `what` was to get it."""
    x = as_activations(x)
    sources = x[:, None] if x.ndim == 2 and n_sources == 1 else x
    if sources.ndim != 3 or sources.shape[1:] != (n_sources, d):
        raise ValueError(
            f"{what}, got a tensor of shape {tuple(x.shape)}; pass (n_tokens, n_sources, width) from the hooks it was trained "
            "on, in their order."
        )
    return sources


def as_row(x: Float[Tensor, "token source d"]) -> Float[Tensor, "token width"]:
    """A token's sources one after the other."""
    return rearrange(x, "token source d -> token (source d)")


def as_sources(row: Float[Tensor, "token width"], n_sources: int) -> Float[Tensor, "token source d"]:
    """The inverse of `as_row`."""
    return rearrange(row, "token (source d) -> token source d", source=n_sources)
