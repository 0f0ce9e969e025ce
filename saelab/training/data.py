"""Where training rows come from: a cache, its path, a stream, tensors, or an iterator of them, all as one `DataSource`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activation_cache.layout import config_hash
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.row_labels import row_labels
from saelab.activation_cache.streaming import ActivationStream
from saelab.saes import Batch
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.step import RULES
from saelab.training.data_source import MOST_ROWS, DataSource, Moments, Rows, row_numbers
from saelab.training.kept_out import n_kept_out
from saelab.training.tensor_data import as_rows, from_iterator, from_tensors

_Cache = ActivationCache | ActivationStream


def open_data(data: Any, hook_name: str | None, rules: int = RULES, device: torch.device | None = None) -> DataSource:
    """Make a `DataSource` from any data that `saelab.train` accepts. Raises `ValueError` for anything else.

    `rules` are the training rules of the run, which determine whether rows are held out of the batches.
    For a CUDA `device` the rows of a cache or stream come in the dtype they are stored in, those of a cache in pinned memory.
    """
    if isinstance(data, DataSource):
        return data
    if isinstance(data, str | Path):
        data = ActivationCache(data)
    if isinstance(data, ActivationCache | ActivationStream):
        return _from_cache(data, hook_name, rules, device is not None and device.type == "cuda")
    if isinstance(data, Tensor | np.ndarray | Batch):
        return from_tensors(as_rows(data), rules)
    if isinstance(data, Iterable):
        return from_iterator(iter(data))
    raise ValueError(
        f"Cannot train on {type(data).__name__}: pass a cache, its path, a stream, a tensor or NumPy array (n, d_in), a "
        "Batch(x, y) or Batch(x, x, gradient) of them, or an iterator of these."
    )


def _from_cache(cache: _Cache, hook_name: str | None, rules: int, for_cuda: bool) -> DataSource:
    if isinstance(cache, ActivationStream):
        cache = cache.by_rules(rules)
    leave_out = 0 if isinstance(cache, ActivationStream) else n_kept_out(cache.n_rows, rules)

    @functools.cache
    def moments(name: str) -> Moments:
        return Moments((stats := cache.stats(name))["mean"].float(), stats["second_moment"].sum())

    options = _reading(cache, leave_out, for_cuda)

    def batches(names: Sequence[str], batch_size: int, seed: int, start_step: int) -> Iterator[Rows]:
        return cache.batches(batch_size, seed=seed, start_step=start_step, hook_name=list(names), **options)

    def identity(hooks: HooksUsed) -> tuple[str, dict[str, Any]]:
        origin = _origin(cache, hooks)
        if isinstance(cache, ActivationStream):
            return f"stream {cache.fingerprint} {hooks}", origin
        storage = cache.manifest["config"]["dtype"]
        rounded = "" if storage == "bfloat16" else f" {storage}"  # rounds rows differently
        return f"cache {origin['dataset_fingerprint']}{rounded} {hooks}", origin

    streamed = isinstance(cache, ActivationStream)
    return DataSource(
        moments=moments,
        batches=batches,
        choose=lambda variant, config: variant.hooks(config, cache.hook_names, hook_name),
        identity=identity,
        n_rows=None if streamed else cache.n_rows - leave_out,
        documents=lambda: cache.document_ids,
        rows="" if isinstance(cache, ActivationStream) else config_hash(cache.manifest["config"]),
        held_bytes=cache.held_bytes if streamed else 0,
        pinned=options.get("pin_memory", False),
        labels=row_numbers if isinstance(cache, ActivationStream) else functools.partial(row_labels, cache, leave_out),
        kept_out=functools.partial(_left_out, cache, leave_out) if leave_out else None,
        sample=None if isinstance(cache, ActivationStream) else functools.partial(_sample, cache, leave_out),
        lacks_gradients=_lacks_gradients(cache),
    )


def _left_out(cache: _Cache, leave_out: int, names: Sequence[str]) -> Rows:
    assert isinstance(cache, ActivationCache)
    return cache.left_out(leave_out, list(names))


def _sample(cache: ActivationCache, leave_out: int, name: str) -> Tensor:
    """The first rows of a hook in the shuffled order of seed 0."""
    n = min(cache.n_rows - leave_out, MOST_ROWS)
    size = min(n, 4096)
    drawn = cache.batches(size, seed=0, hook_name=[name], leave_out=leave_out)
    return torch.cat([rows[name].float() for rows in itertools.islice(drawn, -(-n // size))])[:n]


def _lacks_gradients(cache: _Cache) -> str | None:
    again = f"--hook-name {' '.join(cache.hook_names)} --n-tokens NUMBER --gradients"
    if isinstance(cache, ActivationStream):
        return f"a stream supplies none: train on a cache, saelab harvest RUN {again}"
    if cache.gradients is None:
        return f"{cache.path} holds none: harvest again into another RUN, saelab harvest RUN {again}"
    return None


def _reading(cache: _Cache, leave_out: int, for_cuda: bool) -> dict[str, Any]:
    """Options of `cache.batches`; for a GPU rows stay as they are stored, but int8 is dequantised to float32."""
    if isinstance(cache, ActivationStream):
        return {"dtype": torch.bfloat16 if for_cuda else torch.float32}
    stored = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(cache.manifest["config"]["dtype"])
    dtype = stored if for_cuda and stored is not None else torch.float32
    return {"dtype": dtype, "leave_out": leave_out, "pin_memory": for_cuda}


def _origin(cache: _Cache, hooks: HooksUsed) -> dict[str, Any]:
    """The origin of the rows of these hooks; hooks of a single model have no "MODEL/" prefix."""
    each = {name: cache.origin(name) for name in hooks.all}
    models = {label: model for label, model in cache.models.items() if any(n.startswith(f"{label}/") for n in each)}
    if len(models) == 1:
        hooks = HooksUsed(*(tuple(name.partition("/")[2] for name in names) for names in hooks))
        each = {name.partition("/")[2]: origin for name, origin in each.items()}
    origin = each[hooks.inputs[-1]] | hooks.origin()
    if len(each) > 1:
        max_norms = {name: one["mask"]["max_norm"] for name, one in each.items()}
        origin["mask"] = origin["mask"] | {"max_norm": max_norms}
    return origin | ({"models": models} if len(models) > 1 else {})
