"""A vector as a non-negative sum of a few decoder rows: orthogonal matching pursuit (Pati et al. 1993) with non-negative least
squares on the chosen rows (Lawson and Hanson 1974), in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.saes import SAE
from saelab.saes.trained_hooks import steered_hook
from saelab.validation import check_integer

_EPS = 1e-9
_ROUNDING = 1e-6
"""What is left is noise once no row has a larger dot product with it, relative to the vector, which was rounded to float32."""


class FeatureShare(NamedTuple):
    """One feature of a vector."""

    feature: int
    coefficient: float
    """How much of the feature's unit decoder row is in the vector, in raw units of the activations."""
    cosine: float
    """Between the decoder row and the vector."""
    explained: float
    """Share of the vector's squared norm that this feature and those before it explain."""


def as_features(
    vector: Float[Tensor, " d_in"], sae: SAE, k: int = 10, hook_name: str | None = None
) -> list[FeatureShare]:
    """At most `k` features whose unit decoder rows, with positive coefficients, add up to nearly the vector, in the order in
    which they are chosen: each time the row with the largest dot product with what is left.

    Fewer where no row points towards what is left. `hook_name` chooses a crosscoder's source. Raises `ValueError` for a vector of
    another width than the decoder rows, naming both.
    """
    check_integer("k", k, 1)
    decoder, _ = sae.decoder(steered_hook(sae, hook_name)[1])
    if decoder.shape[1] != vector.numel():
        raise ValueError(
            f"The vector has width {vector.numel()}, but the decoder rows of this SAE have width {decoder.shape[1]}: use an SAE "
            "of the hook that the vector was made at."
        )
    rows = decoder.detach().double().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    target = vector.detach().double().cpu()
    size = target.norm()
    target = target / size
    chosen = _pursue(rows, target, k)
    cosines = rows @ target
    coefficients = _non_negative(rows[chosen], target)
    shares = []
    for n, (feature, coefficient) in enumerate(zip(chosen, coefficients.tolist(), strict=True), start=1):
        left = target - _non_negative(rows[chosen[:n]], target) @ rows[chosen[:n]]
        explained = 1 - float(left.square().sum())
        shares.append(FeatureShare(feature, coefficient * float(size), float(cosines[feature]), explained))
    return shares


def _pursue(rows: Float[Tensor, "d_sae d_in"], target: Float[Tensor, " d_in"], k: int) -> list[int]:
    """The chosen rows; one that the others make superfluous leaves again, and does not come back."""
    chosen: list[int] = []
    open_rows = torch.ones(len(rows), dtype=torch.bool)
    left = target
    while len(chosen) < k:
        scores = torch.where(open_rows, rows @ left, -torch.inf)
        best = int(scores.argmax())
        if float(scores[best]) <= _ROUNDING:
            break
        open_rows[best] = False
        tried = [*chosen, best]
        coefficients = _non_negative(rows[tried], target)
        chosen = [row for row, coefficient in zip(tried, coefficients.tolist(), strict=True) if coefficient > _ROUNDING]
        left = target - _non_negative(rows[chosen], target) @ rows[chosen]
    return chosen


def _non_negative(rows: Float[Tensor, "n d_in"], target: Float[Tensor, " d_in"]) -> Float[Tensor, " n"]:
    """The coefficients >= 0 whose sum of rows is nearest to the target, by the active-set method of Lawson and Hanson."""
    gram, aim = rows @ rows.T, rows @ target
    found, active = torch.zeros_like(aim), torch.zeros(len(aim), dtype=torch.bool)
    for _ in range(3 * len(aim)):
        gradient = torch.where(active, -torch.inf, aim - gram @ found)
        if not len(aim) or float(gradient.max()) <= _EPS:
            break
        active[int(gradient.argmax())] = True
        while True:
            solved = torch.zeros_like(aim)
            solved[active] = torch.linalg.lstsq(gram[active][:, active], aim[active, None]).solution[:, 0]
            below = active & (solved <= 0)
            if not bool(below.any()):
                break
            step = (found[below] / (found[below] - solved[below]).clamp_min(1e-300)).min()
            found = found + step * (solved - found)
            active &= found > _EPS
            found = torch.where(active, found, 0.0)
        found = solved
    return found
