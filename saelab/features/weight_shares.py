"""What a decoder row says by its weights alone: which attention heads it belongs to, or which sources of a crosscoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from saelab.errors import StoreError
from saelab.features.search import Search


def head_shares(store: Search, feature: int) -> list[float] | None:
    """Each attention head's share of a decoder row at `hook_z`: the norm of its part over the sum of these norms, by head. None
    at other hooks, and for a row of zeros. Raises `StoreError` for a store of an earlier saelab, which knows no heads."""
    if not store.hook_name.endswith("hook_z"):
        return None
    n_heads = store.manifest.get("n_heads")
    row = _rows(store, feature)[-1]
    if not n_heads or len(row) % n_heads:
        raise StoreError(
            f"{store.folder} does not say how many heads its model has: renew it with `saelab features RUN --renew`."
        )
    return _shares(np.linalg.norm(row.reshape(n_heads, -1), axis=1))


def source_norms(store: Search, feature: int) -> list[dict[str, Any]] | None:
    """For each source of a crosscoder a dict with "source" (its hook), "norm" (of the feature's decoder row there, in units in
    which every source has the same mean square) and "share" (of the sum of these norms); None for any other SAE."""
    hooks = (store.manifest.get("sites") or {}).get("writes") or []
    if len(hooks) < 2:
        return None
    norms = np.linalg.norm(_rows(store, feature), axis=1)
    shares = _shares(norms) or [0.0] * len(norms)
    return [
        {"source": hook, "norm": float(norm), "share": share}
        for hook, norm, share in zip(hooks, norms, shares, strict=True)
    ]


def _rows(store: Search, feature: int) -> np.ndarray:
    """The decoder row of each source, `(n_sources, d_in)` float64."""
    store.check_feature(feature)
    W_dec = store.weights["W_dec"]
    return (W_dec if W_dec.ndim == 3 else W_dec[None])[:, feature].astype(np.float64)


def _shares(norms: np.ndarray) -> list[float] | None:
    total = norms.sum()
    return (norms / total).tolist() if total else None
