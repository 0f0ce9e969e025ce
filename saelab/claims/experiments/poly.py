"""32 features in 32 dimensions, 3 to 5 of them active: 8 pairs also write the product of their activations, each along a
direction of its own, and 8 other pairs often fire together. PolySAE and TopK with 32 features, and TopK with one more for each
product, at k 4.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch.nn.functional import cosine_similarity

from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.planted import Planted, pairs
from saelab.evaluation.interactions import busiest, firing_together, pair_table, pearson
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import fvu
from saelab.saes import SAE, PolyConfig, TopKConfig
from saelab.training import TrainConfig, train

D_SAE, K, STEPS, BATCH = 32, 4, 3000, 256
N_PRODUCTS, TOKENS = 8, 20_000
CONFIGS = {
    "poly": PolyConfig(D_SAE, K, rank_pairs=D_SAE),
    "poly, separate": PolyConfig(D_SAE, K, mode="separate", rank_pairs=D_SAE),
    "topk": TopKConfig(D_SAE, K),
    "topk, wider": TopKConfig(D_SAE + N_PRODUCTS, K),
}


def measure(seed: int) -> dict[str, dict[str, float]]:
    data = pairs(seed, n_products=N_PRODUCTS)
    run = TrainConfig(n_tokens=STEPS * BATCH, batch_size=BATCH, seed=seed, device="cpu")
    saes = train(list(CONFIGS.values()), data.stream(seed), run, progress=False)
    x = data.held_out(TOKENS, seed)
    return {label: _measured(sae, data, x) for label, sae in zip(CONFIGS, saes, strict=True)}


@torch.no_grad()
def _measured(sae: SAE, data: Planted, x: torch.Tensor) -> dict[str, float]:
    """FVU and L0; how far interactions (of TopK: covariances of activations) follow from firing together; and the share of the
    planted products among as many pairs of largest interaction."""
    x_hat, feature_acts = sae(x)
    measures = {"fvu": float(fvu(x, x_hat)), "l0": feature_acts.nnz / len(x)}
    if sae.additive:
        return measures | {"correlation": _of_covariances(feature_acts)}
    table = pair_table(sae, feature_acts)
    cosines = cosine_similarity(sae.decoder()[0][:, None], data.features, dim=2)
    planted = [] if data.products is None else data.products.pairs.tolist()
    true = {tuple(sorted(cosines[:, pair].argmax(0).tolist())) for pair in planted}
    largest = {tuple(pair) for pair in table.pairs[table.norms.argsort(descending=True)[:N_PRODUCTS]].tolist()}
    return measures | {"correlation": table.correlation, "found": len(largest & true) / N_PRODUCTS}


def _of_covariances(feature_acts: SparseActs) -> float:
    """Pearson's r over pairs of features between the magnitude of their covariance and how often both fire."""
    features = busiest(feature_acts, feature_acts.d_sae)
    together = firing_together(feature_acts, features)
    covariances = torch.cov(feature_acts.to_dense()[:, features].T).abs()
    i, j = torch.tensor(list(combinations(range(len(features)), 2))).T
    return pearson(covariances[i, j], together[i, j])


_PRODUCTS = "Koromilas et al. 2026 (PolySAE): a polynomial decoder represents compositions that a linear one cannot."
_TOGETHER = (
    "Koromilas et al. 2026 (PolySAE): interactions hardly follow firing together (r 0.06; covariance of an SAE 0.82)."
)


def _better(text: str, left: str, right: str) -> Claim:
    return Claim(text, "poly", Side(left, "fvu"), Side(right, "fvu"), at_equal_l0=True, paper=_PRODUCTS)


CLAIMS = [
    _better("PolySAE reconstructs planted products better than TopK at equal k and L0", "poly", "topk"),
    _better("PolySAE with a projection for each term reconstructs them better than TopK", "poly, separate", "topk"),
    _better("PolySAE reconstructs them better than TopK with a feature more for each product", "poly", "topk, wider"),
    Claim(
        "Interactions of PolySAE correlate with firing together by less than 0.2",
        "poly",
        Side("poly", "correlation"),
        0.2,
        paper=_TOGETHER,
    ),
    Claim(
        "They do so less than the covariances of TopK's features",
        "poly",
        Side("poly", "correlation"),
        Side("topk", "correlation"),
        paper=_TOGETHER,
    ),
]
