"""`CodebookConfig`: the knobs of codebook features, the same on cached activations and inside a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from saelab.saes.config import check_config
from saelab.validation import check_integer

Similarity = Literal["inner_product", "euclidean"]
Reduction = Literal["mean", "sum"]
Gradient = Literal["base", "aeloss", "fullaeloss", "vqvae"]
Start = Literal["kmeans", "normal"]
Revive = Literal["replace", "online", "simvq", "none"]


@dataclass(frozen=True)
class CodebookConfig:
    """`d_sae` codes in all; of each group's codes the `k` most similar ones stand for the group's slice of the vector."""

    d_sae: int
    """Number of codes, over all groups."""
    k: int = 8
    """Codes kept per token and group."""
    n_groups: int | None = None
    """Slices of the vector with a codebook each; None: one for each head at a `hook_z` inside a model, else 1."""
    similarity: Similarity = "inner_product"
    """With codes of norm 1, or minus the distance ("euclidean")."""
    reduction: Reduction = "mean"
    """What is made of the k codes: their mean, or their sum."""
    gradient: Gradient = "aeloss"
    """How codes and input learn inside a model (`gradients.py`); on cached activations the loss is the FVU."""
    beta: float = 0.25
    """Weight of the pull of the input to its codes ("fullaeloss" and "vqvae")."""
    rotation: bool = False
    """Hand gradients to the input by the rotation that takes it to its codes (Fifty et al. 2024), not straight through."""
    layer_norm: bool | None = None
    """Look at LayerNorm(x), with gain and bias; None: inside a model. On cached activations it decides the selection only."""
    start: Start = "kmeans"
    """k-means on the first batch, or N(0, 1)."""
    revive: Revive = "replace"
    """Unused codes: put where an input is ("replace"), drawn there a little each step by disuse ("online", Zheng & Vedaldi
    2023), moved with all others by one learned map of frozen codes ("simvq", Zhu et al. 2024; it has its own start), "none"."""
    replace_every: int = 100
    """Steps after which codes that were never kept are replaced."""
    normalize: str = "center_and_scale"
    """Input normalisation on cached activations: "center_and_scale", "scale" or "none"."""

    def __post_init__(self) -> None:
        check_config(self)
        for name, minimum in (("k", 1), ("replace_every", 1), ("n_groups", 1)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum)
        if not self.beta >= 0:
            raise ValueError(f"beta={self.beta} must not be negative.")
        kinds = {
            "similarity": Similarity,
            "reduction": Reduction,
            "gradient": Gradient,
            "start": Start,
            "revive": Revive,
        }
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kind))}.")
        self.check_groups(self.n_groups or 1)

    def check_groups(self, n_groups: int, d_in: int | None = None) -> None:
        """Raises `ValueError` where codes or vector cannot be shared out to so many groups."""
        if self.d_sae % n_groups or (d_in or 0) % n_groups:
            what = f"d_sae={self.d_sae}" + ("" if d_in is None else f" and d_in={d_in}")
            raise ValueError(f"{what} must be divisible by the {n_groups} groups (n_groups).")
        if self.k > self.d_sae // n_groups:
            raise ValueError(
                f"k={self.k} is more than the {self.d_sae // n_groups} codes of a group (d_sae={self.d_sae} in {n_groups} "
                "groups): lower k or raise d_sae."
            )

    @property
    def value(self) -> float:
        """What each kept code counts in the output."""
        return 1 / self.k if self.reduction == "mean" else 1.0
