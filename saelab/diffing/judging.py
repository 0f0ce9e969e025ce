"""Which features that look specific to one model are so, by Latent Scaling (Minder et al. 2025, arXiv 2504.02922, section 3).

Candidates have a decoder row at one side only, nearly: a relative norm below 0.1 or above 0.9. Their thresholds: a candidate is

    an artefact by complete shrinkage where |nu_error| >= 0.2: the other model's activations contain the feature
    an artefact by latent decoupling where |nu_reconstruction| >= 0.5: other features write its direction there
    specific otherwise, if the activations of its own model contain it

That features which fire on too few tokens are not judged, and the intervals, are saelab's. An interval is from the 2.5th to the
97.5th percentile over resampled blocks of neighbouring contexts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saelab.diffing.judged import DEAD, DECOUPLED, NOT_HELD, RARE, SHRUNK, SPECIFIC, DiffFeature, Interval, Related
from saelab.diffing.measuring import Documents, Measured
from saelab.features.intervals import benjamini_hochberg, fisher, newcombe
from saelab.features.sides import ONE_SIDE, SHARED

NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
MIN_TOKENS, MIN_BLOCKS = 20, 3
"""To be judged, a candidate has to fire on so many tokens, and in so many blocks."""
MIN_DOCUMENTS = 10
"""Of either kind, to say whether a feature has to do with the change."""
ALPHA = 0.05
_RESAMPLED = 1000


def kinds(delta: np.ndarray) -> np.ndarray:
    """Indices into `features.sides.CLASSES`: a only, shared, b only, other."""
    chosen = [delta < ONE_SIDE, (delta >= SHARED) & (delta <= 1 - SHARED), delta > 1 - ONE_SIDE]
    return np.select(chosen, [0, 1, 2], 3)


def enough(found: Measured) -> np.ndarray:
    """`(d_sae,)` bool: features that fire often enough to be judged."""
    return (found.n_fired.sum(0) >= MIN_TOKENS) & ((found.n_fired > 0).sum(0) >= MIN_BLOCKS)


def nu(found: Measured) -> np.ndarray:
    """`(2, d_sae)`: nu_error and nu_reconstruction of every feature; NaN where it never fired."""
    return _ratios(found)[:, 0]


def _ratios(found: Measured) -> np.ndarray:
    """`(2, 1 + N_RANDOM, d_sae)`: both ratios of every feature, and of the random directions in its place; the factor at its own
    side, by which is divided, is that of the feature."""
    sums = found.numerators.sum(3)  # (target, direction, side, feature)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(found.n_fired.sum(0) > 0, sums[:, :, 1] / sums[:, :1, 0], np.nan)


def judge(found: Measured, seed: int = 0) -> list[DiffFeature]:
    """All candidates: those that survive first, then by how often they fire."""
    candidates = np.flatnonzero(np.isin(kinds(found.delta), (0, 2)))
    if not len(candidates):
        return []
    n_blocks = len(found.n_tokens)
    weights = np.random.default_rng(seed).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), _RESAMPLED)
    weights = weights.astype(np.float64)
    part = found.numerators[:, 0][..., candidates]  # (target, side, block, candidate)
    with np.errstate(invalid="ignore", divide="ignore"):
        nus = [_intervals(nu(found)[i, candidates], weights @ part[i, 1] / (weights @ part[i, 0])) for i in (0, 1)]
        density = found.n_fired[:, candidates]
        shares = _intervals(
            density.sum(0) / found.n_tokens.sum(), weights @ density / (weights @ found.n_tokens)[:, None]
        )
    held = (part[:, 0].sum(1) > 0).all(0)
    related = _related(found.documents, candidates, enough(found)[candidates])
    rows = [
        _feature(found, int(feature), shares[i], (nus[0][i], nus[1][i]), bool(held[i]), related[i])
        for i, feature in enumerate(candidates)
    ]
    order = {SPECIFIC: 0, DEAD: 3, RARE: 2}
    return sorted(rows, key=lambda row: (order.get(row.verdict, 1), -row.n_fired, row.feature))


def _feature(
    found: Measured,
    feature: int,
    density: Interval,
    nus: tuple[Interval, Interval],
    held: bool,
    related: Related | None,
) -> DiffFeature:
    n_fired = int(found.n_fired[:, feature].sum())
    judged = bool(enough(found)[feature])
    reasons = _reasons(nus, held) if judged else ()
    verdict = (reasons[0] if reasons else SPECIFIC) if judged else RARE if n_fired else DEAD
    sure = judged and (_certain(nus) if verdict == SPECIFIC else _certain_not(nus, reasons))
    side = "b" if found.delta[feature] >= 0.5 else "a"
    cosine = float(found.cosine[feature])
    return DiffFeature(
        feature, side, float(found.delta[feature]), cosine, n_fired, density, *nus, verdict, reasons, sure, related
    )  # fmt: skip


def _reasons(nus: tuple[Interval, Interval], held: bool) -> tuple[str, ...]:
    """Why a candidate is an artefact; () if it is none."""
    if not held:
        return (NOT_HELD,)
    found = ((SHRUNK, nus[0], NU_ERROR), (DECOUPLED, nus[1], NU_RECONSTRUCTION))
    return tuple(name for name, ratio, most in found if not abs(ratio.value) < most)


def _certain(nus: tuple[Interval, Interval]) -> bool:
    """Whether both intervals lie within the thresholds."""
    return all(
        -most < one.low and one.high < most for one, most in zip(nus, (NU_ERROR, NU_RECONSTRUCTION), strict=True)
    )


def _certain_not(nus: tuple[Interval, Interval], reasons: tuple[str, ...]) -> bool:
    """Whether an interval lies beyond its threshold."""
    beyond = [
        one.low >= most or one.high <= -most for one, most in zip(nus, (NU_ERROR, NU_RECONSTRUCTION), strict=True)
    ]
    return (SHRUNK in reasons and beyond[0]) or (DECOUPLED in reasons and beyond[1])


def _intervals(values: np.ndarray, resampled: np.ndarray) -> list[Interval]:
    """Of each candidate; NaN where it never fired."""
    known = np.where(np.isfinite(resampled), resampled, np.nan)
    low, high = np.full((2, len(values)), np.nan)
    some = np.isfinite(known).any(0)
    low[some], high[some] = np.nanquantile(known[:, some], (0.025, 0.975), axis=0)
    return [Interval(*map(float, one)) for one in zip(values, low, high, strict=True)]


def _related(documents: Documents | None, candidates: np.ndarray, judged: np.ndarray) -> list[Related | None]:
    """Whether candidates fire in more of the documents that show the change, by Fisher's exact test with Benjamini and Hochberg's
    correction over those that are judged."""
    none: list[Related | None] = [None] * len(candidates)
    if documents is None or not judged.any():
        return none
    (n_a, n_b), (hits_a, hits_b) = documents.n, documents.n_fired[:, candidates[judged]]
    low, high = newcombe(hits_a, n_a, hits_b, n_b)
    q = benjamini_hochberg(fisher(hits_a, n_a, hits_b, n_b))
    for place, i in enumerate(np.flatnonzero(judged)):
        difference = Interval(hits_a[place] / n_a - hits_b[place] / n_b, float(low[place]), float(high[place]))
        is_so = bool(min(n_a, n_b) >= MIN_DOCUMENTS and q[place] <= ALPHA and difference.value > 0)
        none[i] = Related(int(hits_a[place]), int(hits_b[place]), difference, float(q[place]), is_so)
    return none


def baseline(found: Measured) -> dict[str, Any]:
    """What random directions score in the place of the judged candidates: the 95th percentile of |nu|."""
    here = enough(found) & np.isin(kinds(found.delta), (0, 2))
    values = np.abs(_ratios(found)[:, 1:, here]).reshape(2, -1)
    values = values[:, np.isfinite(values).all(0)]
    if not values.shape[1]:
        return {"n": 0, "nu_error": None, "nu_reconstruction": None}
    error, reconstruction = np.quantile(values, 0.95, axis=1).tolist()
    return {"n": values.shape[1], "nu_error": error, "nu_reconstruction": reconstruction}
