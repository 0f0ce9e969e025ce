"""PolySAE (Koromilas et al. 2026, "PolySAE: Modeling feature interactions in sparse autoencoders via polynomial decoding",
arXiv 2602.01322): TopK whose decoder adds products of two and of three features, of low rank. With p_n = U_n^T z, of R_n entries,

    z = ReLU(TopK(W_enc (x - b_dec) + b_enc)),   L = FVU + auxk_alpha * AuxK
    x_hat = C_1 p_1 + lambda_2 C_2 (p_1 * p_2) + lambda_3 C_3 (p_1 * p_2 * p_3) + b_dec

where R_1 >= R_2 >= R_3, and products take the first R_2 or R_3 entries. "shared": p_2 and p_3 are the first entries of p_1. After
each step QR makes the columns of each U_n orthonormal again, and if "separate" the first R_3 columns of all three. AuxK decodes
the dead features alone.

Ours: C_1 starts so that the linear part U_1 C_1^T has the rows that TopK starts with, and the encoder has them too; C_2 and C_3
start in the unit of the pre-activations. Decoder norms are not folded: TopK would then select other features, and the columns
would not stay orthonormal. The norm that is reported is that of x_hat - b_dec at z_i = 1, exact at this activation only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.kernels.decode import decode
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import squared_error
from saelab.saes.selection import SelectionConfig, SelectionSAE
from saelab.validation import check_integer

_PRODUCTS = 3 << 30
"""Added to the seed, so that products start from other random numbers than the rows."""
_LAMBDA = 0.5
_FEWER = 8
"""The default rank of the products is this many times smaller than that of the linear part."""


@dataclass(frozen=True)
class PolyConfig(SelectionConfig):
    """A dictionary of `d_sae` features of which at most `k` fire per token, and of their products."""

    mode: Literal["shared", "separate"] = "shared"
    """"shared": one projection of the features for all terms, as in the paper's experiments; "separate": one for each."""
    rank: int | None = None
    """R_1, of the linear part; None means the smaller of d_in and d_sae."""
    rank_pairs: int | None = None
    """R_2, of the products of two features; None means an eighth of `rank`."""
    rank_triples: int | None = None
    """R_3, of the products of three features; None means an eighth of `rank`, at most `rank_pairs`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: value for name in ("rank", "rank_pairs", "rank_triples") if (value := getattr(self, name))}
        for name in ("rank", "rank_pairs", "rank_triples"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, self.d_sae)
        if list(given.values()) != sorted(given.values(), reverse=True):
            told = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{told}: they must not rise, as a product takes the first entries of the term before it.")
        if self.mode == "separate" and 3 * (self.rank_triples or 1) > self.d_sae:
            raise ValueError(
                f"mode='separate' needs 3 * rank_triples orthonormal columns of length d_sae={self.d_sae}, which "
                f"rank_triples={self.rank_triples or 1} exceeds: lower it, raise d_sae, or use mode='shared'."
            )

    def ranks(self, d_in: int) -> tuple[int, int, int]:
        """R_1, R_2 and R_3 for inputs of this width. Raises `ValueError` where a given rank exceeds what it can be."""
        first = self.rank or max(min(d_in, self.d_sae), self.rank_pairs or 0, self.rank_triples or 0)
        if first > d_in:
            raise ValueError(
                f"rank={self.rank}, rank_pairs={self.rank_pairs}, rank_triples={self.rank_triples}: the linear part of a poly "
                f"SAE has at most the rank d_in={d_in} of its inputs, and its products no higher one."
            )
        few = max(first // _FEWER, 1)
        pairs = self.rank_pairs or max(few, self.rank_triples or 0)
        few = min(few, self.d_sae // 3) if self.mode == "separate" else few
        return first, pairs, self.rank_triples or min(few, pairs)


class PolySAE(SelectionSAE):
    """TopK with a decoder that is a polynomial of the feature activations."""

    variant = "poly"
    Config = PolyConfig
    config: PolyConfig
    selection_rule = "the k largest u of the token, where positive"
    unit_norm = False
    additive = False

    def __init__(self, config: PolyConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        generator = torch.Generator().manual_seed(_PRODUCTS + seed)
        with torch.no_grad():
            if config.mode == "separate":
                self.U[:, self.ranks[0] :].normal_(generator=generator)
            for part in self.C.split(self.ranks, 1)[1:]:
                bound = math.sqrt(6 / part.shape[1])  # He et al. 2015
                part.uniform_(-bound, bound, generator=generator)
        self.after_step()

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        self.ranks = self.config.ranks(self.d_in)
        shared = self.config.mode == "shared"
        self.U = nn.Parameter(rows.new_zeros(self.d_sae, self.ranks[0] if shared else sum(self.ranks)))
        self.C = nn.Parameter(rows.new_zeros(self.d_in, sum(self.ranks)))
        with torch.no_grad():
            self.U[:, : self.ranks[0]] = orthonormal(rows[:, : self.ranks[0]])
            self.C[:, : self.ranks[0]] = rows.T @ self.U[:, : self.ranks[0]]
            linear = self.W_dec
        self.W_enc = nn.Parameter(linear / linear.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(self.d_sae)), nn.Parameter(torch.zeros(self.d_in))
        self.lambda2, self.lambda3 = nn.Parameter(torch.tensor(-_LAMBDA)), nn.Parameter(torch.tensor(_LAMBDA))

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The linear part U_1 C_1^T: what a small activation writes."""
        U, C = widened(self.U, self.C)
        return U[:, : self.ranks[0]] @ C[:, : self.ranks[0]].T

    @property
    def rows(self) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae R"], Float[Tensor, " d_in"]]:
        return self.W_enc, self.U, self.b_dec

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of what each feature writes alone at an activation of 1."""
        return self.decoded(widened(self.U)[0]).norm(dim=1)

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"], spread: float) -> None:
        super().start_at(x, y, spread)
        if spread > 0:
            for n, part in enumerate(self.C.split(self.ranks, 1)):
                part.div_(spread**n)

    def fold(self, norms: Float[Tensor, " d_sae"]) -> None:
        """Nothing to do: see the top of the file."""

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        return encode_topk(x, self.W_enc, self.b_enc, self.config.k, center=self.b_dec)

    def projections(self, p: Float[Tensor, "n R"]) -> tuple[Tensor, Tensor, Tensor]:
        """p_1, p_2 and p_3 `(n, R_1)`, `(n, R_2)` and `(n, R_3)`; of `U` itself, U_1, U_2 and U_3."""
        if self.config.mode == "shared":
            return p, p[:, : self.ranks[1]], p[:, : self.ranks[2]]
        first, second, third = p.split(self.ranks, 1)
        return first, second, third

    def decoded(self, projected: Float[Tensor, "n R"]) -> Float[Tensor, "n d_in"]:
        """The polynomial of the projections of n rows of feature activations, `(n, d_in)` without the bias."""
        projected, C, lambda2, lambda3 = widened(projected, self.C, self.lambda2, self.lambda3)
        p_1, p_2, p_3 = self.projections(projected)
        pairs = p_1[:, : self.ranks[1]] * p_2
        triples = pairs[:, : self.ranks[2]] * p_3
        return torch.cat([p_1, lambda2 * pairs, lambda3 * triples], 1) @ C.T

    def rebuild(
        self, feature_acts: SparseActs, target: Float[Tensor, "batch d_out"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
        x_hat = self.decoded(decode(feature_acts, self.U)) + self.b_dec
        return squared_error(target, x_hat), (x_hat - target).detach()

    def decode(self, feature_acts: SparseActs, x: Any = None) -> Float[Tensor, "batch d_in"]:
        return self.denormalize(self.decoded(decode(feature_acts, self.U)) + widened(self.b_dec)[0], x)

    @torch.no_grad()
    def after_step(self) -> None:
        """The retraction of U to orthonormal columns."""
        U_1, U_2, U_3 = self.projections(widened(self.U)[0])
        Q_1 = orthonormal(U_1)
        if self.config.mode == "shared":
            self.U.copy_(Q_1)
            return
        n = self.ranks[2]
        _, Q_2, Q_3 = orthonormal(torch.cat([Q_1[:, :n], U_2[:, :n], U_3], 1)).split(n, 1)
        self.U.copy_(torch.cat([Q_1, orthonormal(torch.cat([Q_2, U_2[:, n:]], 1)), Q_3], 1))


def orthonormal(columns: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """An orthonormal basis of the columns by QR, the diagonal of R positive: it moves with them, and leaves one as it is."""
    Q, R = torch.linalg.qr(columns)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)
