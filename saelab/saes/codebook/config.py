"""`CodebookConfig`: settings of codebook features, both on cached activations and inside a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saelab.saes.config import TURNS_OFF, check_config
from saelab.validation import check_at_least

Similarity = Literal["inner_product", "euclidean"]
Reduction = Literal["mean", "sum"]
Gradient = Literal["base", "aeloss", "fullaeloss", "vqvae"]
Start = Literal["kmeans", "normal"]
Revive = Literal["replace", "online", "simvq", "none"]


@dataclass(frozen=True)
class CodebookConfig:
    """`d_sae` codes in total; each group's slice of the vector is represented by the `k` most similar codes of that group."""

    d_sae: int
    """Number of codes, over all groups."""
    k: int = 8
    """Codes kept per token and group."""
    n_groups: int | None = None
    """Slices of the vector, each with its own codebook; None means one per head at a `hook_z` inside a model, else 1."""
    similarity: Similarity = "inner_product"
    """Inner product with codes scaled to norm 1, or minus the distance ("euclidean")."""
    reduction: Reduction = "mean"
    """How the k codes are combined: mean or sum."""
    gradient: Gradient = "aeloss"
    """How codes and input get gradients inside a model (`gradients.py`); on cached activations the loss is the FVU."""
    beta: float = 0.25
    """Weight of the commitment loss ("fullaeloss" and "vqvae")."""
    rotation: bool = False
    """Pass gradients to the input by the rotation trick (Fifty et al. 2024) instead of straight-through."""
    layer_norm: bool | None = None
    """Compare codes with LayerNorm(x), with gain and bias; None: only inside a model. On a cache it affects selection only."""
    start: Start = "kmeans"
    """Initial codes: k-means on the first batch, or N(0, 1)."""
    revive: Revive = "replace"
    """Dead-code revival: "replace" sets unused codes to inputs; "online" moves codes towards inputs, the less used, the further
    (Zheng & Vedaldi 2023); "simvq" learns a linear map of frozen codes, initialised differently (Zhu et al. 2024); or "none"."""
    replace_every: int = 100
    """Steps after which codes that went unused are replaced ("replace")."""
    normalize: str = "center_and_scale"
    """Input normalisation on cached activations: "center_and_scale", "scale" or "none"."""

    def __post_init__(self) -> None:
        check_config(self)
        check_at_least(self, 1, "k", "replace_every", "n_groups")
        check_at_least(self, 0, "beta", fix=TURNS_OFF)
        self.check_groups(self.n_groups or 1)

    def check_groups(self, n_groups: int, d_in: int | None = None) -> None:
        """Raises `ValueError` if codes or vector cannot be divided into `n_groups` groups."""
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
        """Weight of each kept code in the output."""
        return 1 / self.k if self.reduction == "mean" else 1.0
