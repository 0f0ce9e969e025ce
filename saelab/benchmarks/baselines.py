"""What an SAE has to beat, made from the activations without training, as SAEs that are scored like any other:

pca        the k principal components: the least error of all linear maps of rank k
pca_topk   all principal components, of which the k coordinates of largest magnitude are kept on each token
random     random unit rows as decoder and as encoder, and TopK
identity   the coordinates themselves, all of them: no error, and as many active as there are dimensions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activation_cache.reader import ActivationCache
from saelab.saes import SAE, AbsTopKConfig, AbsTopKSAE, TopKConfig, TopKSAE

BASELINES = ("pca", "pca_topk", "random", "identity")
_BATCH, _N_BATCHES = 4096, 16


def levels(name: str, l0: Sequence[int], d_in: int) -> list[int]:
    """The L0 that a baseline is measured at, of those in `l0`; the identity has its own."""
    return [d_in] if name == "identity" else [k for k in l0 if k <= d_in]


@torch.no_grad()
def baseline(name: str, cache: ActivationCache, hook_name: str, k: int, d_sae: int, seed: int = 0) -> SAE:
    """The baseline with `k` features per token, centred by the mean of the cache's rows; "random" has `d_sae` features."""
    stats = cache.stats(hook_name)
    d_in = len(stats["mean"])
    if name == "random":
        sae: SAE = TopKSAE(TopKConfig(d_sae, k), d_in, seed)
    else:
        rows = torch.eye(d_in) if name == "identity" else principal_components(cache, hook_name)
        rows = rows[:k] if name == "pca" else rows
        sae = AbsTopKSAE(AbsTopKConfig(len(rows), k), d_in)
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
    sae.set_normalization(stats["mean"].float(), stats["second_moment"].sum())
    sae.provenance = replace(
        sae.provenance, origin=cache.origin(hook_name), trained={"baseline": name}, train_documents=cache.document_ids
    )
    return sae.eval()


def principal_components(cache: ActivationCache, hook_name: str) -> Float[Tensor, "d_in d_in"]:
    """Unit rows, of the largest variance first; from up to 65,536 rows of the cache, in float64."""
    n = min(_BATCH, cache.n_rows)
    batches = cache.batches(n, seed=0, hook_name=hook_name)
    mean = cache.stats(hook_name)["mean"].double()
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for _ in range(min(_N_BATCHES, cache.n_rows // n)):
        centred = next(batches).double() - mean
        covariance += centred.T @ centred
    return torch.linalg.eigh(covariance).eigenvectors.T.flip(0).float()
