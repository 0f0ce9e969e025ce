"""Dense baselines of `bench_step`: the obvious step of two matrix products, `topk`, `scatter`, autograd and fused Adam.

`DenseTopK` runs it in fp32, in TF32, under bf16 autocast, and under bf16 autocast and `torch.compile`. `DenseEncoder` decodes
sparsely: the whole row of pre-activations is computed and stored, and only the selected rows of the decoder are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saelab.kernels.decode import decode_error
from saelab.kernels.primitives import project_, unit_norm_
from saelab.kernels.sparse_acts import ByFeature, SparseActs

Precision = Literal["fp32", "tf32", "bf16", "compiled"]


class DenseTopK:
    """A TopK SAE in plain PyTorch with the same loss, projection, clipping, unit norms, counters and log values as ours.

    Weights, gradients and moments are fp32; `precision` is that of the products. "tf32" rounds their operands to 10 mantissa
    bits (on a GPU), "bf16" to 7; both select other features than fp32 does. "compiled" is "bf16" with all but the backward
    pass, clipping and Adam compiled. The host waits once, for the logged values.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int, device: str | torch.device = "cpu", precision: Precision = "fp32"
    ) -> None:
        rows = torch.randn(d_sae, d_in, generator=torch.Generator(device).manual_seed(0), device=device)
        rows /= rows.norm(dim=1, keepdim=True)
        self.k, self.precision = k, precision
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(rows.new_zeros(d_sae)), nn.Parameter(rows.new_zeros(d_in))
        self.parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=2e-3, fused=True)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.loss, self.project, self.after_step = self._loss, self._project, self._after_step
        if precision == "compiled":
            self.loss, self.project = torch.compile(self._loss), torch.compile(self._project)
            self.after_step = torch.compile(self._after_step)

    def step(self, x: Tensor) -> dict[str, float]:
        with matmul_precision("highest" if self.precision == "fp32" else "high"):
            loss, feature_acts = self.loss(x)
            loss.backward()
            with torch.no_grad():
                self.project()
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
                self.adam.step()
                self.adam.zero_grad()
                fired, dead = self.after_step(feature_acts.detach(), len(x))
                logged = torch.stack([loss.detach(), fired / len(x), norm, dead]).tolist()
        return dict(zip(("loss", "l0", "grad_norm", "dead"), logged, strict=True))

    def autocast(self, x: Tensor) -> torch.autocast:
        """The context of the products."""
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision in ("bf16", "compiled"))

    def _loss(self, x: Tensor) -> tuple[Tensor, Any]:
        """The loss, and the feature activations."""
        with self.autocast(x):
            pre_acts = (x - self.b_dec) @ self.W_enc.T + self.b_enc
            top = pre_acts.topk(self.k, dim=1)
            feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
            product = feature_acts @ self.W_dec
        x_hat = product.float() + self.b_dec
        return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum(), feature_acts

    def _project(self) -> None:
        gradient = self.W_dec.grad
        assert gradient is not None
        gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec

    def _after_step(self, feature_acts: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Unit norms and counters; returns the number of active pairs and the fraction of dead features."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        fired = feature_acts != 0
        return fired.sum(), self._count(fired.any(0), batch)

    def _count(self, fired: Tensor, batch: int) -> Tensor:
        self.tokens_since_fired += batch
        self.tokens_since_fired.masked_fill_(fired, 0)
        return (self.tokens_since_fired >= 10**9).float().mean()


class DenseEncoder(DenseTopK):
    """`DenseTopK` with our decoder and our row-wise passes over `W_dec`; encoder, `topk` and their gradients stay dense."""

    def _loss(self, x: Tensor) -> tuple[Tensor, SparseActs]:
        with self.autocast(x):
            pre_acts = (x - self.b_dec) @ self.W_enc.T + self.b_enc
            top = pre_acts.topk(self.k, dim=1)
        feature_acts = sparse_acts_of(top.values.float().relu(), top.indices, len(self.b_enc))
        error, _ = decode_error(feature_acts, self.W_dec, self.b_dec, x)
        return error / (x - x.mean(0)).square().sum(), feature_acts

    def _project(self) -> None:
        assert self.W_dec.grad is not None
        project_(self.W_dec.grad, self.W_dec)

    def _after_step(self, feature_acts: SparseActs, batch: int) -> tuple[Tensor, Tensor]:
        unit_norm_(self.W_dec)
        active = feature_acts.values != 0
        per_feature = torch.zeros_like(self.b_enc).index_add_(0, feature_acts.features, active.float())
        return active.sum(), self._count(per_feature > 0, batch)


def sparse_acts_of(values: Tensor, features: Tensor, d_sae: int) -> SparseActs:
    """k entries `(batch, k)` of each row, zeros included, as `SparseActs`; all shapes are known, so the host never waits."""
    batch, k = values.shape
    features, order = features.sort(dim=1)
    ids = features.flatten()
    by_id, entries = ids.sort(stable=True)
    starts = torch.searchsorted(by_id, torch.arange(d_sae + 1, device=ids.device))
    rows = torch.arange(batch * k, device=ids.device) // k
    derived = {"rows": rows, "by_feature": ByFeature(entries, rows[entries], starts)}
    offsets = torch.arange(0, batch * k + 1, k, device=ids.device)
    return SparseActs(values.gather(1, order).flatten(), ids, offsets, d_sae, derived)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Context manager that sets `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
