"""Small SAEs of every variant, from its defaults: what the contract suites are built on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from saelab.saes import VARIANTS, Batch, StepInfo

D_IN, D_SAE = 12, 40


def config_of(name: str, d_sae: int = D_SAE, **changes: Any) -> Any:
    """Any variant's config, k 5 where it has one."""
    Config = VARIANTS[name].Config
    k = {"k": 5} if "k" in {field.name for field in dataclasses.fields(Config)} else {}
    return Config(d_sae=d_sae, **(k | changes))


def build(name: str, normalize: str = "center_and_scale", **changes: Any) -> Any:
    """An SAE of width 12 with random biases that has seen a batch (which sets the threshold of those that have one)."""
    torch.manual_seed(0)
    sae = VARIANTS[name](config_of(name, normalize=normalize, **changes), D_IN, seed=3)
    sae.set_normalization(torch.linspace(-2, 2, D_IN), 40.0)
    with torch.no_grad():
        for bias in (getattr(sae, "b_enc", None), getattr(sae, "b_dec", None)):
            if bias is not None:
                bias.add_(0.1 * torch.randn(bias.shape))
        if sae.W_dec.requires_grad and not bool(
            sae.W_dec.any()
        ):  # a transcoder's decoder starts at 0, where no gradient reaches the encoder
            sae.W_dec.add_(0.1 * torch.randn(sae.W_dec.shape))
        sae.loss(Batch(rows(64, 5), rows(64, 5)), info())
    return sae


def rows(n: int, seed: int = 0) -> torch.Tensor:
    """Raw activations `(n, 12)`."""
    return 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-2, 2, D_IN)


def data(name: str, x: torch.Tensor) -> Any:
    """`x` as `saelab.train` takes it for this variant: with a gradient if it reads one."""
    gradient = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    return Batch(x, x, gradient) if VARIANTS[name].needs_gradients else x


def info(dead: torch.Tensor | None = None, step: int = 10, d_sae: int = D_SAE) -> StepInfo:
    """That step of 100."""
    return StepInfo(torch.zeros(d_sae, dtype=torch.bool) if dead is None else dead, step, 100)


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `set_normalization` takes of `x`."""
    return x.double().mean(0).float(), x.double().square().sum(-1).mean(0)


def away_from_start(sae: Any, batch: Batch) -> Any:
    """This transcoder, normalised by that batch, with weights moved off 0."""
    sae.set_normalization(*moments(batch.x), *moments(batch.y))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return sae


def interrupt_before(step: int, monkeypatch: Any) -> None:
    """From now on training is interrupted before this step."""
    from saelab.training.sae_run import Run

    real = Run.train_step

    def train_step(self: Run, rows: Any) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        real(self, rows)

    monkeypatch.setattr(Run, "train_step", train_step)
