"""`python -m saelab.benchmarks.collector`: how fast the feature collector is by itself, and how its memory grows.

Feature activations are made up: Zipf-distributed features, 64 per token. The SAE's encoder is left out, but for the
pre-activations in which near misses are looked for. One CSV row: tokens per second over all tokens, and the process's memory
after a tenth of them and at the end.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from saelab.benchmarks.results import to_csv
from saelab.features.collecting.collector import Collector
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import TopKConfig, TopKSAE

CTX_LEN, BATCH = 256, 4096


def made_up(d_sae: int, k: int, n: int, generator: torch.Generator) -> SparseActs:
    """`n` tokens with `k` distinct features each, the common ones Zipf-distributed."""
    ranks = (torch.rand(n, 2 * k, generator=generator).mul(torch.tensor(d_sae + 1.0).log()).exp() - 1).long() % d_sae
    ids = torch.zeros(n, d_sae, dtype=torch.bool).scatter_(1, ranks, True)
    features = ids.nonzero()
    order = torch.ones(len(features), dtype=torch.bool)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ids.sum(1).cumsum(0)])
    order &= torch.arange(len(features)) - offsets[features[:, 0]] < k
    rows, chosen = features[order].unbind(1)
    counts = torch.bincount(rows, minlength=n)
    values = torch.rand(len(chosen), generator=generator).log().neg() + 0.01
    return SparseActs(values, chosen, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), d_sae)


def measured(d_sae: int, k: int, d_in: int, n_tokens: int) -> dict[str, float]:
    """The row of one size. What is made up is made beforehand: 16 batches, in turn."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=d_sae, k=k, normalize="none"), d_in)
    batches = [made_up(d_sae, k, BATCH, generator) for _ in range(16)]
    x = torch.randn(BATCH, d_in, generator=generator)
    state, seconds, memory = Collector(d_sae, CTX_LEN, 20), 0.0, [0.0]
    for step in range(n_tokens // BATCH):
        feature_acts = batches[step % len(batches)]
        feature_acts = SparseActs(
            feature_acts.values, feature_acts.features, feature_acts.offsets, d_sae
        )  # nothing derived is kept
        tokens = torch.arange(BATCH) + step * BATCH
        start = time.perf_counter()
        with torch.inference_mode():
            state.add(sae, x, feature_acts, tokens, tokens // 700)
        seconds += time.perf_counter() - start
        if step == n_tokens // BATCH // 10:
            memory[0] = _peak()
    return {
        "d_sae": d_sae, "k": k, "n_tokens": n_tokens, "tokens_per_second": round(n_tokens / seconds),
        "mb_at_a_tenth": round(memory[0]), "mb_at_the_end": round(_peak()), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> int:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("d-sae", 16384), ("k", 64), ("d-in", 768), ("n-tokens", 2_000_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    print(to_csv([measured(given.d_sae, given.k, given.d_in, given.n_tokens)]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
