"""Where training rows come from: a cache, its path, a tensor or array, or an iterator, all as one `DataSource`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activation_cache.reader import ActivationCache

Rows = Callable[[int, int, int], Iterator[Tensor]]
"""(batch_size, seed, start_step) -> batches from that step on."""


@dataclass
class DataSource:
    """Training rows with what the SAE must remember of them."""

    d_in: int
    mean: Float[Tensor, " d_in"]
    mean_square: float
    """Mean squared norm of a row."""
    fingerprint: str
    batches: Rows
    n_rows: int | None = None
    """How many different rows there are; None where nobody knows."""
    origin: dict[str, Any] = field(default_factory=dict)
    documents: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


def open_data(data: Any, hook_name: str | None, batch_size: int) -> DataSource:
    """Make a `DataSource` of whatever `saelab.train` was given. Raises `ValueError` for anything else."""
    if isinstance(data, str | Path):
        data = ActivationCache(data)
    if isinstance(data, ActivationCache):
        return _from_cache(data, hook_name)
    if isinstance(data, Tensor | np.ndarray):
        return _from_tensor(_as_tensor(data))
    if isinstance(data, Iterable):
        return _from_iterator(map(_as_tensor, data))
    raise ValueError(
        f"Cannot train on {type(data).__name__}: give a cache, its path, a tensor or NumPy array (n, d_in), or an iterator "
        "of such tensors."
    )


def _as_tensor(rows: Any) -> Tensor:
    if isinstance(rows, np.ndarray) and rows.dtype.kind == "f":
        return torch.from_numpy(np.require(rows, np.float32, ["C", "W"]))
    if not isinstance(rows, Tensor):
        kind = f"an array of {rows.dtype}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"Rows to train on are tensors or NumPy arrays of floats, (n, d_in); got {kind}.")
    return rows


def _from_cache(cache: ActivationCache, hook_name: str | None) -> DataSource:
    if hook_name is None:
        if len(cache.hook_names) > 1:
            raise ValueError(f"The cache holds several hooks; give hook_name, one of {', '.join(cache.hook_names)}.")
        hook_name = cache.hook_names[0]
    if hook_name not in cache.hook_names:
        raise ValueError(f"hook_name={hook_name!r} is not in the cache, which holds {', '.join(cache.hook_names)}.")
    stats = cache.stats(hook_name)
    origin = cache.origin(hook_name)

    def batches(batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
        return cache.batches(batch_size, seed=seed, start_step=start_step, hook_name=hook_name)

    return DataSource(
        d_in=cache.d_in(hook_name),
        mean=stats["mean"].float(),
        mean_square=float(stats["second_moment"].sum()),
        fingerprint=f"cache {origin['dataset_fingerprint']} {hook_name}",
        batches=batches,
        n_rows=cache.n_rows,
        origin=origin,
        documents=cache.document_ids,
    )


def _from_tensor(rows: Tensor) -> DataSource:
    if not rows.numel():
        raise ValueError(f"A tensor to train on is (n, d_in) with both above 0, got {tuple(rows.shape)}.")
    rows = _as_rows(rows)
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{int((~rows.isfinite()).any(1).sum())} of {len(rows)} rows hold NaN or infinite values.")

    def batches(batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
        return _shuffled_forever(rows, batch_size, seed, start_step)

    digest = hashlib.sha256(rows.cpu().contiguous().numpy().tobytes()).hexdigest()
    mean_square = float(rows.double().square().sum(1).mean())
    return DataSource(rows.shape[1], rows.double().mean(0).float(), mean_square, f"tensor {digest}", batches, len(rows))


def _as_rows(rows: Tensor, d_in: int | None = None) -> Tensor:
    """fp32 `(n, d_in)`. Raises `ValueError` for another shape or kind."""
    if rows.ndim != 2 or not rows.is_floating_point() or d_in not in (None, rows.shape[1]):
        expected = f"(n, {'d_in' if d_in is None else d_in})"
        raise ValueError(f"A tensor to train on is {expected} floats, got {tuple(rows.shape)} {rows.dtype}.")
    return rows.detach().float()


def _shuffled_forever(rows: Tensor, batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
    """Endless batches; each epoch is a permutation of (seed, epoch), batches run over its border."""
    first, n = start_step * batch_size, len(rows)
    epoch, skip = divmod(first, n)
    waiting = torch.zeros(0, dtype=torch.int64)
    while True:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        waiting = torch.cat([waiting, order[skip:]])
        skip, epoch = 0, epoch + 1
        while len(waiting) >= batch_size:
            yield rows[waiting[:batch_size]]
            waiting = waiting[batch_size:]


def _from_iterator(chunks: Iterator[Tensor]) -> DataSource:
    """Rows as they come; the first chunk's statistics normalise the input. A resume reads past what was used."""
    first = next(chunks, None)
    if first is None:
        raise ValueError("The iterator to train on gave nothing.")
    start = _from_tensor(first)

    def batches(batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
        skip, waiting = start_step * batch_size, first.detach().float()
        while True:
            while len(waiting) >= batch_size + skip:
                waiting, skip = waiting[skip:], 0
                yield waiting[:batch_size]
                waiting = waiting[batch_size:]
            dropped = min(skip, len(waiting))
            waiting, skip = waiting[dropped:], skip - dropped
            chunk = next(chunks, None)
            if chunk is None:
                return
            waiting = torch.cat([waiting, _as_rows(chunk, start.d_in)])

    return DataSource(start.d_in, start.mean, start.mean_square, f"iterator from {start.fingerprint}", batches)
