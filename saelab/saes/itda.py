"""ITDA, inference-time decomposition of activations (Leask, Nanda & Al Moubayed, ICML 2025): the dictionary is made of actual
activations, and nothing is learned by gradient. Rows are read once, in order:

    a = pursuit(x, D, k),   e = |x - D^T a|^2 / |x|^2,   D gains x / |x| where e > tau

Encoding is a signed matching pursuit (orthogonal in the paper's pseudocode, not in its text), decoding D^T a without a bias. Each
atom keeps the label of its row, so that dictionaries of different models can be compared by which tokens they consist of
(`saelab.evaluation.similarity`).

Ours, as the paper leaves it open: the error is relative to |x|^2 (or not: `error="absolute"`); a row is tested against all
earlier rows rather than those of earlier batches, so that the dictionary does not depend on the batch size; a row whose cosine
with an atom is above 0.999 in magnitude is not added; and at `d_sae` atoms the dictionary stays as it is: those of the
earliest rows are kept. Rows of `W_dec` that are not used are zero, and never fire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.kernels.decode import decode
from saelab.kernels.primitives import sddmm
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import sum_of_squares, total_variance
from saelab.saes.atoms import NO_LABEL, extended, numbered
from saelab.saes.base import SAE
from saelab.saes.config import check_config
from saelab.saes.matching_pursuit import MatchingPursuitSAE
from saelab.saes.omp import orthogonal_pursuit
from saelab.saes.step import Batch, Loss, StepInfo
from saelab.validation import check_at_least

DUPLICATE = 0.999
"""A row of a higher cosine with an atom, or with its opposite, is that atom again."""
_PATIENCE = 1.0
"""Seconds before a step shows how many of its rows it has read: the first ones, which make most atoms, take long."""


@dataclass(frozen=True)
class ITDAConfig:
    """A dictionary of at most `d_sae` activations, of which at most `k` add up to a token's."""

    signed: ClassVar[bool] = True
    stop_on_duplicate: ClassVar[bool] = False
    residual_threshold: ClassVar[float] = 0.0
    auxk_alpha: ClassVar[float] = 0.0

    d_sae: int
    """Largest number of atoms; how many there are depends on `tau` and the data."""
    k: int = 16
    """Steps of the pursuit."""
    tau: float = 0.2
    """Error above which an activation becomes an atom; lower values make larger dictionaries."""
    error: Literal["relative", "absolute"] = "relative"
    """The squared error that `tau` is compared with: over the squared norm, or of inputs whose mean squared norm is d_in."""
    solver: Literal["mp", "omp"] = "mp"
    """Matching pursuit, or orthogonal matching pursuit, which fits all activations anew after each step."""
    normalize: str = "scale"
    """Input normalisation, stored with the SAE; "center_and_scale" makes atoms of activations minus their mean (ours)."""

    def __post_init__(self) -> None:
        check_config(self)
        check_at_least(self, 1, "k")
        check_at_least(self, 0, "tau", fix="; at 0 every activation becomes an atom")


class ITDASAE(MatchingPursuitSAE):
    """Decomposes activations into earlier ones."""

    variant = "itda"
    Config: ClassVar[Any] = ITDAConfig
    config: ITDAConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    supports_data_parallel = False
    needs_labels = True
    selection_rule = "k times the largest |<r, d_i>|, which is then taken from r"
    labels: Tensor
    n_atoms: Tensor
    n_rows: Tensor
    fingerprint: Tensor

    def make_weights(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_dec = nn.Parameter(torch.zeros_like(rows), requires_grad=False)
        self.register_buffer("b_dec", torch.zeros(self.d_in))
        self.register_buffer("labels", torch.full((self.d_sae, 2), NO_LABEL))
        for name in ("n_atoms", "n_rows", "fingerprint"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def start_at(self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_in"], spread: float) -> None:
        """Nothing: there is no bias."""

    def after_step(self) -> None:
        """Nothing: atoms keep their bits."""

    def encode_normalized(self, x: Float[Tensor, "batch d_in"]) -> SparseActs:
        if self.config.solver == "omp":
            return orthogonal_pursuit(x, self.W_dec, self.config.k)
        return super().encode_normalized(x)

    def as_exported(self) -> SAE:
        """Raises `SaelabError`: SAELens' matching pursuit, the nearest, has no negative activations."""
        raise SaelabError("An itda is in no other library's format; save it in saelab's own (format='saelab').")

    @torch.no_grad()
    def loss(self, batch: Batch, info: StepInfo) -> Loss:
        x, target = self.normalized(batch)
        labels = numbered(int(self.n_rows), len(x)) if batch.labels is None else batch.labels
        above = self.grow(x, labels.to(self.labels.device))
        feature_acts = self.encode_normalized(x)
        residual = decode(feature_acts, self.W_dec) - target
        fvu = sum_of_squares(residual) / total_variance(target, info.ranks)
        terms = {"fvu": fvu, "atoms": self.n_atoms.to(fvu), "above_tau": fvu.new_tensor(above / max(len(x), 1))}
        return Loss(fvu, feature_acts, residual, target, terms)

    @torch.no_grad()
    def grow(self, x: Float[Tensor, "n d_in"], labels: Int[Tensor, "n 2"]) -> int:
        """Read rows in order, each against the atoms of all earlier ones; returns how many had an error above tau.

        Rows are tested in blocks; those after a new atom again, in a block as long as the distance to it suggests."""
        start, length, above = 0, len(x), 0
        bar = tqdm(
            total=len(x), desc="Rows of this step", leave=False, delay=_PATIENCE, disable=not self.shows_progress
        )
        while start < len(x):
            block = x[start : start + length]
            n_passed, length = len(block), len(x)
            for row in (self.errors(block) > self.config.tau).nonzero().flatten().tolist():
                above += 1
                if self._add(block[row], labels[start + row]):
                    n_passed, length = row + 1, 2 * (row + 1)
                    break
            start += n_passed
            bar.update(n_passed)
        bar.close()
        self.fingerprint.copy_(extended(self.fingerprint, labels))
        self.n_rows += len(x)
        return above

    def errors(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
        """The squared error of normalised rows, as `tau` is compared with; a row's is independent of the others."""
        ids = torch.arange(len(x) + 1, device=x.device)
        rest = x - decode(self.encode_normalized(x), self.W_dec)
        error = sddmm(rest, rest, ids[:-1], ids)
        if self.config.error == "absolute":
            return error
        return error / sddmm(x, x, ids[:-1], ids).clamp_min(torch.finfo(x.dtype).tiny)

    def _add(self, x: Float[Tensor, " d_in"], label: Int[Tensor, " 2"]) -> bool:
        """Make an atom of a row, unless there is no room or it is one already."""
        n, atom = int(self.n_atoms), x / x.norm()
        if n == self.d_sae or (n and float((self.W_dec[:n].to(atom) @ atom).abs().max()) > DUPLICATE):
            return False
        self.W_dec[n], self.labels[n] = atom, label
        self.n_atoms += 1
        return True
