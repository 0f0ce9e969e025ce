"""Check every selection against float64 on the activations of a RUN: `python -m saelab.kernels.bench.exactness RUN`.

Correct float32 sums can differ in their last bits, so a row is not judged if its last kept and first rejected scores are
within a relative gap of 2e-6 (for one threshold over all rows: if a score is that close to it). In all other rows the sets
must be equal. The exit status is 1 if one is not, or if 100 or more rows of a selection are too close to be judged. The
number of rows whose gap is under 1e-5 is also printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

import saelab
from saelab.kernels.encode_batch_topk import encode_batch_topk
from saelab.kernels.encode_feature_topk import encode_feature_topk
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.selection_log import log_selections
from saelab.kernels.sparse_acts import SparseActs

GAP = 2e-6


@dataclass(frozen=True)
class Settings:
    """Settings of the check."""

    run: tyro.conf.Positional[Path]
    """A RUN with a cache and an SAE, for example runs/demo."""
    n_tokens: int = 100_000
    """Tokens of the cache to check."""
    batch_size: int = 2048
    """Tokens encoded at once."""
    k: int | None = None
    """Features per token; None uses the k of the SAE."""


@dataclass
class Count:
    """Counts of rows (for Feature Choice: features) of one selection."""

    rows: int = 0
    close: int = 0
    """Rows whose gap is at most 2e-6, which are not judged."""
    under_1e_5: int = 0
    """Rows whose gap is at most 1e-5."""
    different: int = 0
    """Rows whose sets differ although their scores are not close."""

    def add(self, kept: Tensor, last: Tensor, following: Tensor, wanted: Tensor) -> None:
        """`kept` and `wanted (rows, n)` are masks; `last` and `following (rows)` the last kept and first rejected scores."""
        gap = torch.where(last > 0, (last - following) / last, 1.0)
        close = gap <= GAP
        self.under_1e_5 += int((gap <= 1e-5).sum())
        self.rows += len(kept)
        self.close += int(close.sum())
        self.different += int(((kept != wanted).any(1) & ~close).sum())


def main(settings: Settings) -> int:
    """Print one JSON line per selection; returns 1 if a set was wrong or too many rows were close, else 0."""
    sae = saelab.load_sae(settings.run / "sae" if (settings.run / "sae").exists() else settings.run)
    weights = sae.W_enc.detach(), sae.b_enc.detach()
    norms = sae.W_dec.detach().norm(dim=1) * torch.linspace(0.5, 2, sae.d_sae)
    counts: dict[str, Count] = {}
    threshold = 0.0
    with log_selections() as log:
        for x in tqdm(_tokens(sae, settings), total=-(-settings.n_tokens // settings.batch_size), unit="batch"):
            exact = x.double() @ weights[0].double().T + weights[1].double()
            k = settings.k or sae.config.k
            for name, signed, score in (("value", exact, "value"), ("magnitude", exact.abs(), "magnitude")):
                _judge(counts.setdefault(f"topk {name}", Count()), encode_topk(x, *weights, k, score), signed, k)
            scaled = exact * norms.double()
            _judge(
                counts.setdefault("topk decoder_norm", Count()),
                encode_topk(x, *weights, k, "decoder_norm", norms),
                scaled,
                k,
            )
            _judge_batch(counts.setdefault("batch_topk", Count()), encode_batch_topk(x, *weights, k * len(x)), exact, k)
            threshold = threshold or float(exact.flatten().topk(k * len(x)).values[-1])  # of the first batch, for all
            feature_acts = encode_threshold(x, *weights, threshold)
            _judge_threshold(counts.setdefault("threshold", Count()), feature_acts, exact, threshold)
            m = max(1, k * len(x) // sae.d_sae)
            capacity = torch.full((sae.d_sae,), m)
            feature_acts = encode_feature_topk(x, *weights, capacity)
            _judge(counts.setdefault("feature_topk", Count()), feature_acts, exact.T, m, transposed=True)
    for name, count in counts.items():
        print(json.dumps({"selection": name, **vars(count)}))
    print(json.dumps({"log": asdict(log)}))
    return int(any(count.different or count.close >= 100 for count in counts.values()))


def _tokens(sae: saelab.saes.SAE, settings: Settings) -> Iterator[Tensor]:
    from saelab.activation_cache.reader import ActivationCache

    batches = ActivationCache(settings.run / "cache").batches(settings.batch_size)
    for _ in range(-(-settings.n_tokens // settings.batch_size)):
        with torch.no_grad():
            yield sae.normalize(next(batches)) - sae.b_dec.detach()


def _judge(count: Count, feature_acts: SparseActs, scores: Tensor, k: int, transposed: bool = False) -> None:
    kept = feature_acts.to_dense() != 0
    top = scores.topk(k + 1, dim=1)
    last, following = top.values[:, k - 1].clamp_min(0), top.values[:, k].clamp_min(0)
    wanted = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top.indices[:, :k], True) & (scores > 0)
    count.add(kept.T if transposed else kept, last, following, wanted)


def _judge_batch(count: Count, feature_acts: SparseActs, scores: Tensor, k: int) -> None:
    """One threshold for the batch; a row is close if one of its scores is close to it."""
    best = scores.flatten().topk(k * len(scores) + 1).values
    _judge_threshold(count, feature_acts, scores, float((best[-1] + best[-2]) / 2))


def _judge_threshold(count: Count, feature_acts: SparseActs, scores: Tensor, threshold: float) -> None:
    wanted = scores > threshold
    nearest = (scores - threshold).abs().amin(1)
    count.add(feature_acts.to_dense() != 0, torch.full_like(nearest, threshold), threshold - nearest, wanted)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Settings, description=__doc__)))
