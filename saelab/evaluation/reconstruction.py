"""Reconstruction metrics: sums over all scored tokens, divided once at the end (never a mean of ratios)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.saes import SAE, SAEOutput

DENSE_ABOVE = 0.1


class VarianceSums:
    """Pooled FVU: `sum |x - x_hat|^2 / sum |x - mean(x)|^2`, the mean being over all rows added.

    A row with several sources counts as one long row.
    """

    def __init__(self) -> None:
        self.n, self.squared_error, self.squared = 0, 0.0, 0.0
        self.total = torch.zeros((), dtype=torch.float64)  # takes the width of a row at the first `add`

    def add(self, x: Float[Tensor, "n *sources d"], x_hat: Float[Tensor, "n *sources d"]) -> None:
        """Add rows, in float64."""
        x, x_hat = x.flatten(1).double().cpu(), x_hat.flatten(1).double().cpu()
        self.n += len(x)
        self.squared_error += float((x - x_hat).square().sum())
        self.squared += float(x.square().sum())
        self.total = self.total + x.sum(0)

    @property
    def mean(self) -> Float[Tensor, " *width"]:
        """Mean row."""
        return self.total / max(self.n, 1)

    @property
    def squared_deviations(self) -> float:
        """`sum |x - mean(x)|^2`; 0 if the rows do not vary."""
        variance = self.squared - self.n * float(self.mean.square().sum())
        return variance if variance > 1e-12 * max(self.squared, 1e-300) else 0.0

    @property
    def fvu(self) -> float | None:
        """None if the rows do not vary."""
        variance = self.squared_deviations
        return self.squared_error / variance if variance else None


class Reconstruction:
    """The metrics of a report that need no language model."""

    def __init__(self, sae: SAE) -> None:
        self.variance, self._by_source = VarianceSums(), []
        self.firings = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.hat = VarianceSums()
        self.cosine, self.inner = 0.0, 0.0

    def add(self, x: Float[Tensor, "n *sources d"], output: SAEOutput) -> None:
        """Add the kept rows of one batch: the targets `x` and the SAE's output."""
        self.variance.add(x, output.x_hat)
        if x.ndim == 3:
            self._by_source = self._by_source or [VarianceSums() for _ in range(x.shape[1])]
            for source, sums in enumerate(self._by_source):
                sums.add(x[:, source], output.x_hat[:, source])
        self.hat.add(output.x_hat, output.x_hat)
        self.firings += torch.bincount(output.acts.features.cpu(), minlength=len(self.firings))
        x, x_hat = x.flatten(1).double(), output.x_hat.flatten(1).double()
        inner, squared_hat = (x * x_hat).sum(1), x_hat.square().sum(1)
        self.inner += float(inner.sum())
        self.cosine += float((inner / (x.norm(dim=1) * squared_hat.sqrt()).clamp_min(1e-300)).sum())

    @property
    def fvu_by_source(self) -> list[float | None]:
        """The FVU of each source by itself; [] if there is only one."""
        return [sums.fvu for sums in self._by_source]

    @property
    def relative_bias(self) -> float | None:
        """`E|x_hat - mean(x_hat)|^2 / E[(x - mean(x)) . (x_hat - mean(x_hat))]`; 1 is unbiased, None if either is constant.

        (Rajamanoharan et al. 2024 do not centre the rows, so a large mean hides the shrinkage of everything else.)
        """
        covariance = self.inner - self.variance.n * float(self.variance.mean @ self.hat.mean)
        spread = (self.variance.squared_deviations * self.hat.squared_deviations) ** 0.5
        return self.hat.squared_deviations / covariance if abs(covariance) > 1e-9 * spread > 0 else None

    def results(self) -> dict[str, float | None]:
        """Keys of `report.json`."""
        n, fvu = self.variance.n, self.variance.fvu
        return {
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1 - fvu,
            "l0": float(self.firings.sum()) / n,
            "dead_fraction": float((self.firings == 0).double().mean()),
            "dense_fraction": float((self.firings > DENSE_ABOVE * n).double().mean()),
            "cosine": self.cosine / n,
            "relative_reconstruction_bias": self.relative_bias,
        }
