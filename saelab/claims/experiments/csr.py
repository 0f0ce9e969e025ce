"""Is a sentence's nearest neighbour of the same concept? The 5,035 sentences of the package have 16 concepts of WordNet, 38 to
600 sentences each; an embedding is the mean over a sentence's tokens of SmolLM2-135M's residual stream (block 14). A fifth, drawn
by the seed, is held out and compared; SAEs with k = 16 are trained on the rest in ten passes and used with 4 to 64 features.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.smollm2 import HOOK, language_model
from saelab.evaluation.retrieval import compare_retrieval
from saelab.saes import CSRConfig, TopKConfig
from saelab.steering.text_activations import text_vectors
from saelab.tokens.sources import open_named
from saelab.training import TrainConfig, train

KS = (4, 8, 16, 32, 64)
K, EXPANSION, BATCH, STEPS = 16, 4, 256, 160
PAPER = (
    "Wen et al. 2025: contrastive sparse embeddings retrieve better than Matryoshka embeddings cut to the same length (principal "
    "components stand for these here), and the contrastive term helps."
)


@cache
def labelled_embeddings() -> tuple[Float[Tensor, "n d_in"], tuple[str, ...]]:
    """Every sentence's embedding and its concept."""
    rows = sorted(open_named("concepts", "text").rows(["text", "concept"]), key=lambda row: len(str(row["text"])))
    texts = [str(row["text"]) for row in rows]
    return text_vectors(language_model(), texts, HOOK, "sentences").float(), tuple(str(row["concept"]) for row in rows)


def measure(seed: int) -> dict[str, dict[str, float]]:
    """1-NN accuracy of every kind of embedding at each of `KS`."""
    x, labels = labelled_embeddings()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, seen = order[: len(x) // 5], order[len(x) // 5 :]
    d_sae = EXPANSION * x.shape[1]
    configs = {
        "csr": CSRConfig(d_sae, K),
        "csr, no contrast": CSRConfig(d_sae, K, contrast=0.0),
        "topk": TopKConfig(d_sae, K, multi_topk=True),
    }
    steps = TrainConfig(n_tokens=STEPS * BATCH, batch_size=BATCH, seed=seed)
    found: dict[str, dict[str, float]] = {}
    for label, sae in zip(configs, train(list(configs.values()), x[seen], steps, progress=False), strict=True):
        for one in compare_retrieval(sae, x[held_out], [labels[i] for i in held_out], KS, fit=x[seen], seed=seed):
            name = label if one.embedding == "sae" else one.embedding
            found.setdefault(name, {})[f"accuracy_{one.k}"] = one.accuracy
    return found


def _above(other: str, text: str) -> list[Claim]:
    """CSR retrieves better than `other`, with few features and with many."""
    sides = [(Side("csr", f"accuracy_{k}"), Side(other, f"accuracy_{k}"), k) for k in (8, 32)]
    return [Claim(f"{text}, at {k}", "csr", left, right, below=False, paper=PAPER) for left, right, k in sides]


CLAIMS = [
    *_above("pca", "CSR finds a neighbour of the same concept more often than as many principal components"),
    *_above("topk", "CSR does so more often than TopK"),
    *_above("csr, no contrast", "CSR does so more often than without the contrastive term"),
]
