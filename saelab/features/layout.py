"""A map of the features of an SAE: places in the plane, near each other where decoder rows point the same way.

By t-SNE (van der Maaten & Hinton 2008) on the cosines of 50 principal components, which needs the extra `map` and takes
minutes, so it is made once, by `saelab map RUN`; or by the first two principal components, which separate little.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saelab.errors import SaelabError
from saelab.features.store import FeatureStore
from saelab.files import atomic_path

N_COMPONENTS, PERPLEXITY = 50, 30.0
MAX_CORNERS = 64
"""Of a polygon."""
_VERSION = 1


class Layout(NamedTuple):
    """Where the features are."""

    xy: np.ndarray
    """`(d_sae, 2)` float32, from -1 to 1; NaN for features that never fired, whose rows say nothing."""
    method: str
    """"tsne" or "pca"."""

    def nearest(self, feature: int, n: int = 50) -> np.ndarray:
        """The `n` features nearest to one on the map, itself first; none for one that is not on it."""
        distance = np.square(self.xy - self.xy[feature]).sum(1)
        return np.argsort(distance, kind="stable")[: min(n, int((~np.isnan(distance)).sum()))]

    def inside(self, polygon: Sequence[tuple[float, float]]) -> np.ndarray:
        """The features inside a polygon, given by its corners (even-odd where it crosses itself). Raises `ValueError` for fewer
        than 3 or more than 64 corners, and for corners that are not finite."""
        corners = np.asarray(polygon, dtype=np.float64)
        if (
            corners.ndim != 2
            or corners.shape[1] != 2
            or not 3 <= len(corners) <= MAX_CORNERS
            or not np.isfinite(corners).all()
        ):
            raise ValueError(f"A polygon needs 3 to {MAX_CORNERS} corners (x, y), finite numbers.")
        x, y = self.xy.astype(np.float64).T
        odd = np.zeros(len(x), dtype=bool)
        for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            crosses = (y1 > y) != (y2 > y)
            odd ^= crosses & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1 if y2 != y1 else 1.0))
        return np.flatnonzero(odd)


def read_layout(store: FeatureStore) -> Layout:
    """The map that was made for the SAE of a store, else the one of two principal components."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(layout_path(store), framework="np") as file:
            made, xy = json.loads(file.metadata()["layout"]), file.get_tensor("xy")
        if made["sae"] == store.manifest["sae"]["hash"] and xy.shape == (store.d_sae, 2):
            return Layout(np.where(_alive(store)[:, None], xy, np.nan), made["method"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        pass  # there is none, or it is damaged: it can be made again
    return pca_layout(store)


def pca_layout(store: FeatureStore) -> Layout:
    """The features by the first two principal components of their decoder rows."""
    alive, xy = _alive(store), np.full((store.d_sae, 2), np.nan, dtype=np.float32)
    if alive.any():
        xy[alive] = _fitted(_components(store.directions()[alive], 2))
    return Layout(xy, "pca")


def make_layout(store: FeatureStore, *, seed: int = 0, progress: bool = True) -> Layout:
    """Make the map of a store by t-SNE and keep it beside the store; the same seed gives the same map. Raises `SaelabError`
    without the extra `map`, and if fewer than 5 features fired."""
    try:
        from openTSNE import TSNE  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SaelabError("A t-SNE map needs openTSNE: pip install 'saelab[map]'.") from error
    alive = _alive(store)
    n = int(alive.sum())
    if n < 5:
        raise SaelabError(f"Only {n} features of {store.folder} fired: a map needs 5 or more.")
    rows = _components(store.directions()[alive], N_COMPONENTS)
    # One thread: with several the sums, and so the map, would differ from call to call.
    fit = TSNE(perplexity=min(PERPLEXITY, (n - 1) / 3), metric="cosine", n_jobs=1, random_state=seed, verbose=progress)
    xy = np.full((store.d_sae, 2), np.nan, dtype=np.float32)
    xy[alive] = _fitted(np.asarray(fit.fit(rows)))
    _write(layout_path(store), xy, {"sae": store.manifest["sae"]["hash"], "method": "tsne", "seed": seed})
    return Layout(xy, "tsne")


def layout_path(store: FeatureStore) -> Path:
    """Where the map of a store is kept: beside its files, under the hash of the SAE, as a store never changes."""
    return store.folder / f"layout-{store.manifest['sae']['hash'][:16]}.safetensors"


def _write(path: Path, xy: np.ndarray, made: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    with atomic_path(path) as temporary:
        save_file({"xy": xy}, temporary, {"layout": json.dumps(made | {"version": _VERSION})})


def _alive(store: FeatureStore) -> np.ndarray:
    return store.column("n_fired") > 0


def _components(rows: np.ndarray, n: int) -> np.ndarray:
    """The first `n` principal components of rows, `(len(rows), n)` float64; the sign of each by its largest entry."""
    centred = rows - rows.mean(0)
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    vectors = vectors[:, ::-1][:, :n]
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    return centred @ vectors


def _fitted(xy: np.ndarray) -> np.ndarray:
    """Shifted and scaled, alike in both directions, to -1 to 1."""
    if xy.shape[1] < 2:  # a stream of width 1
        xy = np.concatenate([xy, np.zeros_like(xy)], axis=1)
    low, high = xy.min(0), xy.max(0)
    return 2 * (xy - (low + high) / 2) / max(float((high - low).max()), 1e-12)
