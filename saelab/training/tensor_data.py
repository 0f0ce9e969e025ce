"""Training rows from tensors, arrays, or an iterator of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activation_cache.columns import gradient_of
from saelab.saes import SAE, Batch
from saelab.saes.atoms import numbered
from saelab.saes.hooks_used import HooksUsed
from saelab.training.data_source import MOST_ROWS, DataSource, Moments, Rows
from saelab.training.kept_out import n_kept_out

_GRADIENT = gradient_of("x")
_LACKS_GRADIENTS = "these rows come without: pass a Batch(x, x, gradient)"


def from_tensors(rows: Rows, rules: int) -> DataSource:
    """A source of the rows of one tensor, or of x and y. Raises `ValueError` if they are empty or not finite."""
    _check_rows(rows)

    def batches(names: Sequence[str], batch_size: int, seed: int, start_step: int) -> Iterator[Rows]:
        orders = _shuffled(n - len(last), batch_size, seed, start_step)
        return ({name: rows[name][first[order] if len(last) else order] for name in names} for order in orders)

    def labels(batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
        orders, numbers = _shuffled(n - len(last), batch_size, seed, start_step), numbered(0, n)
        return (numbers[first[order]] for order in orders)

    def kept_out(names: Sequence[str]) -> Rows:
        return {name: rows[name][last] for name in names}

    def identity(hooks: HooksUsed) -> tuple[str, dict[str, Any]]:
        return f"tensor {' '.join(digests)}", {"hook_name_out": "y"} if hooks.outputs != hooks.inputs else {}

    n = len(rows["x"])
    # Rows of a document are often adjacent, so held-out rows are sampled from all.
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    first, last = mixed[: n - n_kept_out(n, rules)].sort().values, mixed[n - n_kept_out(n, rules) :]
    digests = [hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest() for x in rows.values()]

    @functools.cache
    def moments(name: str) -> Moments:
        x = rows[name].double()
        return Moments(x.mean(0).float(), x.square().sum(-1).mean(0))

    def sample(name: str) -> Tensor:
        return rows[name][mixed] if n > MOST_ROWS else rows[name]

    choose = functools.partial(_tensor_hooks, rows=rows)
    held, lacks = kept_out if len(last) else None, None if _GRADIENT in rows else _LACKS_GRADIENTS
    more = {"labels": labels, "kept_out": held, "sample": sample, "lacks_gradients": lacks}
    return DataSource(moments, batches, choose, identity, len(first), **more)


def _check_rows(rows: Rows) -> None:
    for name, x in rows.items():
        if not x.numel():
            raise ValueError(f"A tensor to train on must be (n, d_in) with both above 0; {name} is {tuple(x.shape)}.")
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{int((~x.isfinite()).flatten(1).any(1).sum())} of {len(x)} rows contain NaN or infinite values."
            )


def _tensor_hooks(variant: type[SAE], config: Any, rows: Rows) -> HooksUsed:
    """x, and y if there is one: the target of a transcoder, or a second view. Raises `ValueError` for rows that do not fit the
    config."""
    predicts = "d_out" in variant.extra_dims
    several = config.hook_names if "n_sources" in variant.extra_dims else None
    if "y" in rows and variant.takes_view:
        if rows["y"].shape != rows["x"].shape:
            raise ValueError(
                f"The second view must have the shape of the rows, {tuple(rows['x'].shape)}; y is {tuple(rows['y'].shape)}."
            )
        return HooksUsed(("x",), ("x",), ("y",))
    if "y" in rows and not predicts:
        raise ValueError(
            f"{type(config).__name__} reconstructs its input: pass a tensor to train on, not a Batch(x, y)."
        )
    field = "hook_name_out" if hasattr(config, "hook_name_out") else "hook_names_out"
    if "y" not in rows and predicts and getattr(config, field) is not None:
        raise ValueError(
            f"{field}={getattr(config, field)!r} needs rows of that hook to train on: pass a Batch(x, y), or a cache."
        )
    n_sources = [x.shape[1] if x.ndim == 3 else 1 for x in rows.values()]
    if several is not None and len(several) != n_sources[0]:
        raise ValueError(
            f"hook_names={several} names {len(several)} sources; the tensor to train on has {n_sources[0]}."
        )
    if len(set(n_sources)) > 1:
        raise ValueError(f"x and y to train on must have the same number of sources per row, got {n_sources}.")
    return HooksUsed(("x",), ("y",) if "y" in rows else ("x",))


def as_rows(data: Any, like: Rows | None = None) -> Rows:
    """fp32 rows, named "x" and "y", of a tensor, an array, or a Batch of them. Raises `ValueError` for a wrong shape or type."""
    given = _named(data) if isinstance(data, Batch) else {"x": data}
    if like is not None and given.keys() != like.keys():
        raise ValueError(f"Every chunk to train on must have {' and '.join(like)}; this one has {' and '.join(given)}.")
    rows = {name: _as_floats(one, None if like is None else like[name].shape[1:]) for name, one in given.items()}
    if len({len(x) for x in rows.values()}) > 1:
        raise ValueError(
            f"x and y to train on must have the same number of rows, got {[len(x) for x in rows.values()]}."
        )
    return rows


def _named(batch: Batch) -> dict[str, Any]:
    """What a Batch holds, by name. Raises `ValueError` for a gradient that is not one of x."""
    if batch.gradient is None:
        return {"x": batch.x, "y": batch.y}
    shapes = [tuple(getattr(one, "shape", ())) for one in (batch.x, batch.gradient)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The gradient of a Batch must have the shape of x, {shapes[0]}; got {shapes[1]}.")
    given = {"x": batch.x, _GRADIENT: batch.gradient}
    return given if batch.y is batch.x else given | {"y": batch.y}


def _as_floats(rows: Any, row_shape: Sequence[int] | None = None) -> Tensor:
    if isinstance(rows, np.ndarray) and rows.dtype.kind == "f":
        rows = torch.from_numpy(np.require(rows, np.float32, ["C", "W"]))
    if not isinstance(rows, Tensor):
        kind = f"an array of {rows.dtype}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"Rows to train on must be tensors or NumPy arrays of floats, (n, d_in); got {kind}.")
    if rows.layout != torch.strided:
        raise ValueError(f"Rows to train on must be dense; got a tensor of layout {rows.layout}: use .to_dense().")
    fits = rows.ndim in (2, 3) if row_shape is None else rows.shape[1:] == torch.Size(row_shape)
    if not fits or not rows.is_floating_point():
        expected = "(n, d_in)" if row_shape is None else f"(n, {', '.join(map(str, row_shape))})"
        raise ValueError(f"A tensor to train on must be {expected} floats, got {tuple(rows.shape)} {rows.dtype}.")
    return rows.detach().float()


def _shuffled(n: int, batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
    """Row indices of endless batches; each epoch is a permutation seeded by (seed, epoch), and batches may span two epochs."""
    epoch, skip = divmod(start_step * batch_size, n)
    waiting = torch.zeros(0, dtype=torch.int64)
    while True:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        waiting = torch.cat([waiting, order[skip:]])
        skip, epoch = 0, epoch + 1
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]


def from_iterator(chunks: Iterator[Any]) -> DataSource:
    """Rows in the order they come; statistics of the first chunk set the normalisation. A resume skips rows already used."""
    given = next(chunks, None)
    if given is None:
        raise ValueError("The iterator to train on yielded nothing.")
    start = from_tensors(first := as_rows(given), rules=1)  # no rows are held out: more may come

    def batches(names: Sequence[str], batch_size: int, seed: int, start_step: int) -> Iterator[Rows]:
        skip, waiting = start_step * batch_size, {name: first[name] for name in names}
        while True:
            while (n := len(waiting[names[0]])) >= batch_size + skip:
                yield {name: x[skip : skip + batch_size] for name, x in waiting.items()}
                waiting, skip = {name: x[skip + batch_size :] for name, x in waiting.items()}, 0
            waiting, skip = {name: x[min(skip, n) :] for name, x in waiting.items()}, skip - min(skip, n)
            given = next(chunks, None)
            if given is None:
                return
            chunk = as_rows(given, first)
            waiting = {name: torch.cat([x, chunk[name]]) for name, x in waiting.items()}

    def identity(hooks: HooksUsed) -> tuple[str, dict[str, Any]]:
        fingerprint, origin = start.identity(hooks)
        return f"iterator from {fingerprint}", origin

    kept = {"sample": start.sample, "lacks_gradients": start.lacks_gradients}
    return DataSource(start.moments, batches, start.choose, identity, **kept)
