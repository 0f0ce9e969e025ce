"""Planted features of three layers, 72 in all and 3 active per token: each is in the stream from its own layer on, and adds to
the outputs of that and all later layers, in another direction at each. Trained are a cross-layer transcoder and separate
BatchTopK transcoders of each layer: of as many features and as many active per token in all, or ("separate, twice") of twice as
many features, and as many active as there are at each output.

The paper's comparison is on language models; this one is ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator

from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.planted import HELD_OUT, TOKENS, low_coherence
from saelab.evaluation.reconstruction import VarianceSums
from saelab.saes import SAE, Batch, BatchTopKTranscoderConfig, CrossLayerTranscoderConfig
from saelab.training import TrainConfig, train

N_LAYERS, D, PER_LAYER, WIDTH = 3, 32, 24, 32
"""Layers, width of the stream, planted features of a layer, and learned features of a layer."""
BATCH, N_STEPS, ROWS = 512, 1000, 16_384


def measure(seed: int) -> dict[str, dict[str, float]]:
    """FVU over all outputs, features active per token and features that ever fire, on fresh tokens."""
    planted = _Planted(seed)
    batch = planted.rows(ROWS, Generator().manual_seed(HELD_OUT + seed))
    return {label: _measured(saes, batch) for label, saes in _trained(planted, seed).items()}


class _Planted:
    def __init__(self, seed: int) -> None:
        n = N_LAYERS * PER_LAYER
        here = (torch.arange(N_LAYERS)[:, None] >= torch.arange(n) // PER_LAYER)[:, :, None]
        self.inputs = here * low_coherence(n, D, seed)  # (n_layers, n, d)
        self.outputs = here * torch.stack([low_coherence(n, D, seed + 100 * (i + 1)) for i in range(N_LAYERS)])

    def rows(self, n: int, generator: Generator) -> Batch:
        """n random tokens, in each of which one feature of every layer is active on average."""
        n_features = self.inputs.shape[1]
        active = torch.rand(n, n_features, generator=generator) < 1 / PER_LAYER
        z = active * (1 + 0.25 * torch.randn(n, n_features, generator=generator)).abs()
        return Batch(*(torch.einsum("nf,lfd->nld", z, rows) for rows in (self.inputs, self.outputs)))

    def stream(self, seed: int, layer: int | None) -> Iterator[Batch]:
        """Fresh tokens without end; of one layer alone, or of all."""
        generator = Generator().manual_seed(TOKENS + seed)
        while True:
            batch = self.rows(8192, generator)
            yield batch if layer is None else Batch(batch.x[:, layer], batch.y[:, layer])


def _trained(planted: _Planted, seed: int) -> dict[str, list[SAE]]:
    options = TrainConfig(n_tokens=N_STEPS * BATCH, batch_size=BATCH, lr=3e-3, warmup_steps=100, seed=seed)

    def trained(config: Any, layer: int | None = None) -> SAE:
        sae = train(config, planted.stream(seed, layer), options, progress=False)
        assert isinstance(sae, SAE)
        return sae

    def separate(widths: list[int], ks: list[int]) -> list[SAE]:
        sizes = enumerate(zip(widths, ks, strict=True))
        return [trained(BatchTopKTranscoderConfig(width, k, normalize="scale"), i) for i, (width, k) in sizes]

    together = CrossLayerTranscoderConfig(N_LAYERS * WIDTH, N_LAYERS, normalize="scale")
    return {
        "cross-layer": [trained(together)],
        "separate": separate([WIDTH] * N_LAYERS, [1] * N_LAYERS),
        "separate, twice": separate([WIDTH * (i + 1) for i in range(N_LAYERS)], [i + 1 for i in range(N_LAYERS)]),
    }


@torch.no_grad()
def _measured(saes: list[SAE], batch: Batch) -> dict[str, float]:
    pairs = [(batch.x, batch.y)] if len(saes) == 1 else zip(batch.x.unbind(1), batch.y.unbind(1), strict=True)
    sums, hats = VarianceSums(), []
    l0, n_used = 0.0, 0
    for sae, (x, _) in zip(saes, pairs, strict=True):
        x_hat, feature_acts = sae(x)
        hats.append(x_hat.flatten(1))
        l0, n_used = l0 + feature_acts.nnz / len(x), n_used + len(feature_acts.features.unique())
    sums.add(batch.y, torch.cat(hats, 1))
    assert sums.fvu is not None
    return {"fvu": sums.fvu, "l0": l0, "n_used": n_used}


def _claim(text: str, against: str, measure: str, times: float = 1.0, at_equal_l0: bool = False) -> Claim:
    return Claim(
        text,
        "cross_layer_transcoder",
        Side("cross-layer", measure),
        Side(against, measure),
        times=times,
        at_equal_l0=at_equal_l0,
        paper='Ameisen et al. 2025, "Circuit tracing": cross-layer transcoders match a model better than per-layer ones, and a '
        "feature of theirs stands for a chain of features that carry it on through the layers.",
    )


CLAIMS = [
    _claim(
        "Predicts what features write to later layers better at equal L0 and size", "separate", "fvu", at_equal_l0=True
    ),
    _claim("Predicts it better than separate transcoders of twice the size and L0", "separate, twice", "fvu"),
    _claim("Needs at most 0.6 times the features of those", "separate, twice", "n_used", 0.6),
]
