"""Synthetic data with known features, to measure which of them an SAE recovers:

    x = sum_i z_i f_i + noise,   |f_i| = 1,   z_i = |N(1, 1/4)| where feature i is active, else 0

The kinds of data differ in which features are active: with equal or Zipf frequencies, a fixed or a varying number per
token, with both signs, as children of a parent, or with different strengths in a second model (then x is (n_sources, d_in)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn.functional import normalize

FeatureActs = Float[Tensor, "n n_features"]
FEATURES, TOKENS, HELD_OUT = (n * 2**30 for n in (1, 2, 3))
"""Offsets added to a seed, so that an SAE's initial weights, the features, the tokens and the held-out tokens share no random
numbers (a generator uses only the lowest 32 bits of its seed)."""
SPREAD = 0.25
HARD, HARD_SHARE = 6, 0.4
WEAK = 0.3


@dataclass(frozen=True)
class Planted:
    """Known features, and how tokens are sampled from them."""

    features: Float[Tensor, " n_features *d"]
    """(n_features, d_in), or (n_features, n_sources, d_in) with each source's own strength."""
    sample: Callable[[int, Generator], FeatureActs]
    """The true feature activations of n tokens."""
    groups: dict[str, slice] = field(default_factory=dict)
    """Groups of features that are also measured separately, by name."""
    noise: float = 0.0

    def rows(self, n: int, generator: Generator) -> Float[Tensor, " n *d"]:
        """n random tokens."""
        x = torch.tensordot(self.sample(n, generator), self.features, 1)
        return x + self.noise * torch.randn(x.shape, generator=generator) if self.noise else x

    def stream(self, seed: int, chunk: int = 8192) -> Iterator[Float[Tensor, " chunk *d"]]:
        """An endless stream of fresh tokens for `saelab.train`, `chunk` at a time."""
        generator = torch.Generator().manual_seed(TOKENS + seed)
        while True:
            yield self.rows(chunk, generator)

    def held_out(self, n: int, seed: int) -> Float[Tensor, " n *d"]:
        """n tokens that are in no stream."""
        return self.rows(n, _held_out(seed))

    def held_out_feature_acts(self, n: int, seed: int) -> FeatureActs:
        """The true feature activations of those tokens."""
        return self.sample(n, _held_out(seed))


def _held_out(seed: int) -> Generator:
    return torch.Generator().manual_seed(HELD_OUT + seed)


def superposition(
    seed: int = 0,
    d_in: int = 32,
    n_features: int | None = None,
    n_active: int = 3,
    zipf: bool = False,
    mixed: bool = False,
    signed: bool = False,
    noise: float = 0.0,
) -> Planted:
    """Twice as many features as dimensions, `n_active` in each token.

    `zipf`: feature r is drawn with probability proportional to 1 / r. `mixed`: one active feature in 60 % of the tokens, six
    in the others. `signed`: each activation has a random sign. `noise`: standard deviation of what is added to each coordinate.
    """
    n_features = n_features or 2 * d_in
    weights = 1 / torch.arange(1, n_features + 1) if zipf else torch.ones(n_features)

    def sample(n: int, generator: Generator) -> FeatureActs:
        counts = torch.full((n,), n_active)
        if mixed:
            counts = torch.where(torch.rand(n, generator=generator) < HARD_SHARE, HARD, 1)
        feature_acts = _active(counts, weights, generator) * _magnitudes(n, n_features, generator)
        return (
            feature_acts * (2 * torch.randint(2, feature_acts.shape, generator=generator) - 1)
            if signed
            else feature_acts
        )

    half = n_features // 2
    groups = {"common": slice(0, half), "rare": slice(half, n_features)} if zipf else {}
    return Planted(low_coherence(n_features, d_in, seed), sample, groups, noise)


def hierarchy(seed: int = 0, d_in: int = 24, n_parents: int = 8, n_children: int = 4) -> Planted:
    """Two levels: a token has one of the orthonormal parents and, with probability 3/4, one of its children.

    Siblings are mutually exclusive, and each child is orthogonal to its parent; child c of parent p is feature
    `n_parents + p * n_children + c`.
    """
    generator = torch.Generator().manual_seed(FEATURES + seed)
    parents = torch.linalg.qr(torch.randn(d_in, n_parents, generator=generator)).Q.T
    children = torch.randn(n_parents, n_children, d_in, generator=generator)
    children -= (children @ parents[:, :, None]) * parents[:, None]
    n_features = n_parents * (1 + n_children)

    def sample(n: int, generator: Generator) -> FeatureActs:
        parent = torch.randint(n_parents, (n,), generator=generator)
        child = torch.randint(n_children, (n,), generator=generator)
        present = torch.rand(n, generator=generator) < 0.75
        active = torch.zeros(n, n_features)
        active[torch.arange(n), parent] = 1
        active[torch.arange(n), n_parents + parent * n_children + child] = present.float()
        return active * _magnitudes(n, n_features, generator)

    features = torch.cat([parents, normalize(children, dim=-1).flatten(0, 1)])
    return Planted(features, sample, {"parents": slice(0, n_parents), "children": slice(n_parents, n_features)})


def diffing(seed: int = 0, d_in: int = 24, n_shared: int = 24, n_each: int = 4) -> Planted:
    """Two models that read the same tokens: features are shared, only in the first, only in the second, or weak (0.3) in the
    first. A feature has the same direction in both models."""
    strengths = {
        "shared": (1.0, 1.0),
        "only_first": (1.0, 0.0),
        "only_second": (0.0, 1.0),
        "weak_in_first": (WEAK, 1.0),
    }
    sizes = [n_shared, n_each, n_each, n_each]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    groups = {name: slice(end - size, end) for name, size, end in zip(strengths, sizes, ends, strict=True)}
    strength = torch.tensor(list(strengths.values())).repeat_interleave(torch.tensor(sizes), 0)  # (n_features, 2)
    directions = low_coherence(len(strength), d_in, seed)

    def sample(n: int, generator: Generator) -> FeatureActs:
        active = _active(torch.full((n,), 3), torch.ones(len(strength)), generator)
        return active * _magnitudes(n, len(strength), generator)

    return Planted(strength[:, :, None] * directions[:, None], sample, groups, noise=0.02)


def low_coherence(
    n_features: int, d_in: int, seed: int, limit: float = 0.2, steps: int = 500
) -> Float[Tensor, "n_features d_in"]:
    """Random unit rows, pushed apart where the magnitude of their cosine exceeds `limit`."""
    generator = torch.Generator().manual_seed(FEATURES + seed)
    rows = normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
    for _ in range(steps):
        cosine = rows @ rows.T
        beyond = (cosine - cosine.clamp(-limit, limit)).fill_diagonal_(0)
        rows = normalize(rows - 0.5 * beyond @ rows, dim=1)
    return rows


def _active(counts: Int[Tensor, " n"], weights: Float[Tensor, " n_features"], generator: Generator) -> FeatureActs:
    """1 where a feature is active: `counts` distinct ones per token, drawn without replacement in proportion to `weights`."""
    uniform = torch.rand(len(counts), len(weights), generator=generator)
    order = (weights.log() - (-uniform.log()).log()).argsort(dim=1, descending=True)  # Gumbel top-k: all at once
    chosen = (torch.arange(len(weights)) < counts[:, None]).float()
    return torch.zeros_like(uniform).scatter(1, order, chosen)


def _magnitudes(n: int, n_features: int, generator: Generator) -> FeatureActs:
    return (1 + SPREAD * torch.randn(n, n_features, generator=generator)).abs()
