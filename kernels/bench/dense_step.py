"""The baseline of `bench_step`: the obvious dense step of two matrix products, `topk`, `scatter`, autograd, fused Adam."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseTopK:
    """A TopK SAE in plain PyTorch with the same loss, projection, clipping, unit norms, counters and log values as ours.

    With `tf32` a GPU's products round their operands to 10 mantissa bits: several times faster, but no longer exact.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, device: str = "cpu", tf32: bool = False) -> None:
        self._precision = "high" if tf32 else "highest"
        rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(device)
        self.k = k
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(rows.new_zeros(d_sae)), nn.Parameter(rows.new_zeros(d_in))
        self.parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=2e-3, fused=True)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def step(self, x: Tensor) -> dict[str, float]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._precision)
        try:
            return self._step(x)
        finally:
            torch.set_float32_matmul_precision(before)

    def _step(self, x: Tensor) -> dict[str, float]:
        pre_acts = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        top = pre_acts.topk(self.k, dim=1)
        feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
        x_hat = feature_acts @ self.W_dec + self.b_dec
        loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        loss.backward()
        with torch.no_grad():
            gradient = self.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.adam.step()
            self.adam.zero_grad()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
            fired = feature_acts != 0
            self.tokens_since_fired += len(x)
            self.tokens_since_fired[fired.any(0)] = 0
            l0, dead = fired.sum().item() / len(x), (self.tokens_since_fired >= 10**9).float().mean().item()
        return {"loss": loss.item(), "l0": l0, "grad_norm": norm.item(), "dead": dead}
