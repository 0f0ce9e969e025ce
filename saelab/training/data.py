"""Where training rows come from: a cache, its path, a stream, tensors, or an iterator of them, all as one `DataSource`.

One stream gives the rows of every site that any SAE needs; each SAE takes its own batch from it (`View`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.streaming import ActivationStream
from saelab.saes import SAE, Batch
from saelab.saes.sites import Sites, choose_sites

LEAST_VARIANCE = 5e-7
"""Of the mean square: below it rows are the same but for the rounding of float32."""
Rows = Mapping[str, Tensor]
"""Rows by site; row i is the same token in each."""
Stream = Callable[[Sequence[str], int, int, int], Iterator[Rows]]
"""(sites, batch_size, seed, start_step) -> batches from that step on."""


class Moments(NamedTuple):
    """What the normalisation of a site is made from."""

    mean: Float[Tensor, "*sources d"]
    mean_square: Float[Tensor, "*sources"]
    """Mean squared norm of a row (fp64)."""


class View(NamedTuple):
    """What one SAE takes from the data, and what it must remember of it."""

    sites: Sites
    d_in: int
    shape: dict[str, int]
    """The sizes that its class names in `shape_names`."""
    moments: tuple[Tensor, ...]
    """Arguments of `set_normalization`."""
    fingerprint: str
    origin: dict[str, Any]

    @property
    def width(self) -> int:
        """Numbers in a row that is read, all sources together."""
        return self.d_in * self.shape.get("n_sources", 1)

    @property
    def width_out(self) -> int:
        """Numbers in a row that is rebuilt."""
        return self.shape.get("d_out", self.width)


@dataclass
class DataSource:
    """Training rows of one site or several."""

    moments: Callable[[str], Moments]
    """Of a site."""
    batches: Stream
    choose: Callable[[Any], Sites]
    """Config -> the sites of its SAE."""
    identity: Callable[[Sites], tuple[str, dict[str, Any]]]
    """Sites -> fingerprint of their rows, and the origin that `sae.json` keeps."""
    n_rows: int | None = None
    """How many different rows there are; None where nobody knows."""
    documents: Callable[[], Tensor] = lambda: torch.zeros(0, dtype=torch.int64)
    """Ids of the documents that were read up to now."""
    held_bytes: int = 0
    """Memory that reading takes beside the batches."""

    def view(self, variant: type[SAE], config: Any) -> View:
        """What an SAE of this config takes. Raises `ValueError` where the data does not fit it."""
        sites = self.choose(config)
        x, y = self._moments(sites.reads), self._moments(sites.writes)
        n_sources = max(one.mean.shape[0] if one.mean.ndim == 2 else 1 for one in (x, y))
        sizes = {"n_sources": n_sources, "d_out": y.mean.shape[-1]}
        shape = {name: sizes[name] for name in variant.shape_names}
        if n_sources > 1 and "n_sources" not in shape:
            raise ValueError(
                f"A tensor to train on is (n, d_in) for {variant.variant}, got {n_sources} sources a row: only a "
                "crosscoder reads (n, n_sources, d_in)."
            )
        moments = (*x, *y) if sites.reads != sites.writes else tuple(x)
        return View(sites, x.mean.shape[-1], shape, moments, *self.identity(sites))

    def _moments(self, names: Sequence[str]) -> Moments:
        """Of one site; several of equal width make one with an axis for the sources."""
        several = [_that_vary(name, self.moments(name)) for name in names]
        if len(several) == 1:
            return several[0]
        widths = {name: one.mean.shape[-1] for name, one in zip(names, several, strict=True)}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"The sources of a crosscoder have one width, these have {widths}: choose other hook_names."
            )
        return Moments(*(torch.stack(parts) for parts in zip(*several, strict=True)))


def _that_vary(name: str, moments: Moments) -> Moments:
    """Raises `ValueError` where all rows are the same: there is nothing to learn, and no scale to learn it in."""
    variance = moments.mean_square - moments.mean.double().square().sum(-1)
    same = (variance <= LEAST_VARIANCE * moments.mean_square).flatten().nonzero().flatten().tolist()
    if same:
        where = f" of source {same[0]}" if moments.mean.ndim == 2 else ""
        kind = "the same" if float(moments.mean_square.flatten()[same[0]]) else "zero"
        raise ValueError(
            f"The activations {name!r}{where} to train on are all {kind} (variance {float(variance.flatten()[same[0]]):.1e}): "
            "look at what was harvested, or leave this hook out."
        )
    return moments


def open_data(data: Any, hook_name: str | None) -> DataSource:
    """Make a `DataSource` of whatever `saelab.train` was given. Raises `ValueError` for anything else."""
    if isinstance(data, str | Path):
        data = ActivationCache(data)
    if isinstance(data, ActivationCache | ActivationStream):
        return _from_cache(data, hook_name)
    if isinstance(data, Tensor | np.ndarray | Batch):
        return _from_tensors(_as_rows(data))
    if isinstance(data, Iterable):
        return _from_iterator(iter(data))
    raise ValueError(
        f"Cannot train on {type(data).__name__}: give a cache, its path, a stream, a tensor or NumPy array (n, d_in), a "
        "Batch(x, y) of them, or an iterator of such."
    )


def _from_cache(cache: ActivationCache | ActivationStream, hook_name: str | None) -> DataSource:
    @functools.cache
    def moments(name: str) -> Moments:
        stats = cache.stats(name)
        return Moments(stats["mean"].float(), stats["second_moment"].sum())

    def batches(names: Sequence[str], batch_size: int, seed: int, start_step: int) -> Iterator[Rows]:
        return cache.batches(batch_size, seed=seed, start_step=start_step, hook_name=list(names))

    def identity(sites: Sites) -> tuple[str, dict[str, Any]]:
        origin = _origin(cache, sites)
        if isinstance(cache, ActivationStream):
            return f"stream {cache.fingerprint} {sites}", origin
        storage = cache.manifest["config"]["dtype"]
        rounded = "" if storage == "bfloat16" else f" {storage}"  # other rows
        return f"cache {origin['dataset_fingerprint']}{rounded} {sites}", origin

    streamed = isinstance(cache, ActivationStream)
    return DataSource(
        moments=moments,
        batches=batches,
        choose=lambda config: choose_sites(config, cache.hook_names, hook_name),
        identity=identity,
        n_rows=None if streamed else cache.n_rows,
        documents=lambda: cache.document_ids,
        held_bytes=cache.held_bytes if streamed else 0,
    )


def _origin(cache: ActivationCache | ActivationStream, sites: Sites) -> dict[str, Any]:
    """The origin of these sites' rows; hooks of a single model carry their plain names."""
    each = {name: cache.origin(name) for name in sites.all}
    models = {label: model for label, model in cache.models.items() if any(n.startswith(f"{label}/") for n in each)}
    if len(models) == 1:
        sites = Sites(*(tuple(name.partition("/")[2] for name in names) for names in sites))
        each = {name.partition("/")[2]: origin for name, origin in each.items()}
    origin = each[sites.reads[-1]] | sites.origin()
    if len(each) > 1:
        limits = {name: one["mask"]["max_norm"] for name, one in each.items()}
        origin["mask"] = origin["mask"] | {"max_norm": limits}
    return origin | ({"models": models} if len(models) > 1 else {})


def _from_tensors(rows: Rows) -> DataSource:
    for name, x in rows.items():
        if not x.numel():
            raise ValueError(f"A tensor to train on is (n, d_in) with both above 0, {name} is {tuple(x.shape)}.")
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{int((~x.isfinite()).flatten(1).any(1).sum())} of {len(x)} rows hold NaN or infinite values."
            )

    def batches(names: Sequence[str], batch_size: int, seed: int, start_step: int) -> Iterator[Rows]:
        return ({name: rows[name][order] for name in names} for order in _shuffled(n, batch_size, seed, start_step))

    def identity(sites: Sites) -> tuple[str, dict[str, Any]]:
        return f"tensor {' '.join(digests)}", {"hook_name_out": "y"} if sites.writes != sites.reads else {}

    n = len(rows["x"])
    digests = [hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest() for x in rows.values()]

    @functools.cache
    def moments(name: str) -> Moments:
        x = rows[name].double()
        return Moments(x.mean(0).float(), x.square().sum(-1).mean(0))

    return DataSource(moments, batches, lambda config: _tensor_sites(config, rows), identity, n)


def _tensor_sites(config: Any, rows: Rows) -> Sites:
    """x, and y where it was given: for a transcoder, and only there."""
    predicts, several = hasattr(config, "hook_name_out"), getattr(config, "hook_names", None)
    if "y" in rows and not predicts:
        raise ValueError(
            f"{type(config).__name__} rebuilds what it reads: give a tensor to train on, not a Batch(x, y)."
        )
    if "y" not in rows and predicts and config.hook_name_out is not None:
        raise ValueError(
            f"hook_name_out={config.hook_name_out!r} needs rows of that site to train on: give Batch(x, y), or a cache."
        )
    n_sources = rows["x"].shape[1] if rows["x"].ndim == 3 else 1
    if several is not None and len(several) != n_sources:
        raise ValueError(f"hook_names={several} names {len(several)} sources, the tensor to train on has {n_sources}.")
    return Sites(("x",), ("y",) if "y" in rows else ("x",))


def _as_rows(data: Any, like: Rows | None = None) -> Rows:
    """fp32 rows by site of a tensor, an array, or a Batch of them. Raises `ValueError` for another shape or kind."""
    parts = {"x": data.x, "y": data.y} if isinstance(data, Batch) else {"x": data}
    if like is not None and parts.keys() != like.keys():
        raise ValueError(f"Every chunk to train on has {' and '.join(like)}, this one has {' and '.join(parts)}.")
    rows = {name: _as_floats(part, None if like is None else like[name].shape[1:]) for name, part in parts.items()}
    if len({len(x) for x in rows.values()}) > 1:
        raise ValueError(f"x and y to train on have as many rows each, got {[len(x) for x in rows.values()]}.")
    return rows


def _as_floats(rows: Any, row_shape: Sequence[int] | None = None) -> Tensor:
    if isinstance(rows, np.ndarray) and rows.dtype.kind == "f":
        rows = torch.from_numpy(np.require(rows, np.float32, ["C", "W"]))
    if not isinstance(rows, Tensor):
        kind = f"an array of {rows.dtype}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"Rows to train on are tensors or NumPy arrays of floats, (n, d_in); got {kind}.")
    fits = rows.ndim in (2, 3) if row_shape is None else rows.shape[1:] == torch.Size(row_shape)
    if not fits or not rows.is_floating_point():
        expected = "(n, d_in)" if row_shape is None else f"(n, {', '.join(map(str, row_shape))})"
        raise ValueError(f"A tensor to train on is {expected} floats, got {tuple(rows.shape)} {rows.dtype}.")
    return rows.detach().float()


def _shuffled(n: int, batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
    """Row numbers of batches without end; each epoch is a permutation of (seed, epoch), batches run over its border."""
    epoch, skip = divmod(start_step * batch_size, n)
    waiting = torch.zeros(0, dtype=torch.int64)
    while True:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        waiting = torch.cat([waiting, order[skip:]])
        skip, epoch = 0, epoch + 1
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]


def _from_iterator(chunks: Iterator[Any]) -> DataSource:
    """Rows as they come; the first chunk's statistics normalise the input. A resume reads past what was used."""
    given = next(chunks, None)
    if given is None:
        raise ValueError("The iterator to train on gave nothing.")
    start = _from_tensors(first := _as_rows(given))

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
            chunk = _as_rows(given, first)
            waiting = {name: torch.cat([x, chunk[name]]) for name, x in waiting.items()}

    def identity(sites: Sites) -> tuple[str, dict[str, Any]]:
        fingerprint, origin = start.identity(sites)
        return f"iterator from {fingerprint}", origin

    return DataSource(start.moments, batches, start.choose, identity)
