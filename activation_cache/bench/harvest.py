"""Harvest throughput relative to the bare model: `python -m saelab.activation_cache.bench.harvest`, 3 to 4 minutes.

Bare: the plain Hugging Face model truncated after the hooked block (no later layers, final norm or unembedding), on
precomputed token ids. Harvest: the whole call, from texts to a finished cache on disk. Both share weights, batches and
dtype, and runs alternate.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from saelab.activation_cache.harvest import harvest
from saelab.models import LanguageModel, load_model
from saelab.tokens import load_texts, pack


def cut_model(lm: LanguageModel, layer: int) -> nn.Module:
    """The Hugging Face model up to block `layer`, sharing the weights of `lm`."""
    full = lm.model.base_model
    config = copy.deepcopy(full.config)
    config.num_hidden_layers = layer + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: layer + 1]
    cut = type(full)(config).to(lm.device).eval()
    state = full.state_dict()
    cut.load_state_dict({name: state[name] for name in cut.state_dict()}, assign=True)
    cut.norm = nn.Identity()
    return cut


def seconds_bare(model: nn.Module, batches: list[Tensor], device: Any) -> float:
    """Seconds for one forward pass over all batches."""
    start = time.perf_counter()
    with torch.inference_mode():
        for ids in batches:
            last = model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        last[0, 0, 0].item()  # synchronise with an accelerator
    return time.perf_counter() - start


def seconds_harvest(lm: LanguageModel, texts: Any, hook_name: str, n_tokens: int, sizes: dict[str, Any]) -> float:
    """Seconds for one harvest into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        harvest(lm, texts, [hook_name], n_tokens, Path(folder) / "cache", progress=False, **sizes)
        return time.perf_counter() - start


def main(
    model: str = "smollm2",
    layer: int = 14,
    ctx_len: int = 256,
    batch_size: int = 16,
    n_batches: int = 16,
    pairs: int = 7,
    shard_rows: int = 32_768,
    pool_shards: int = 16,
) -> float:
    """Print a table and return harvest throughput as a fraction of the bare model's (median over the pairs)."""
    lm, texts, hook_name = load_model(model), load_texts("demo"), f"blocks.{layer}.hook_resid_post"
    cut = cut_model(lm, layer)
    packed = islice(pack(texts.documents("train"), lm, ctx_len, batch_size), n_batches)
    batches = [batch.ids for batch in packed]
    n_tokens = sum(ids.numel() for ids in batches)
    sizes = dict(ctx_len=ctx_len, batch_size=batch_size, shard_rows=shard_rows, pool_shards=pool_shards)
    with torch.inference_mode():
        ours = next(iter(lm.stream_activations(batches[:1], [hook_name])))[hook_name]
        assert torch.equal(ours, cut(input_ids=batches[0].to(lm.device), use_cache=False).last_hidden_state)
    seconds_harvest(lm, texts, hook_name, 2 * ctx_len * batch_size, sizes)
    times: dict[str, list[float]] = {"bare": [], "harvest": []}
    for pair in range(pairs):
        for provider in ("bare", "harvest") if pair % 2 == 0 else ("harvest", "bare"):
            if provider == "bare":
                times[provider].append(seconds_bare(cut, batches, lm.device))
            else:
                times[provider].append(seconds_harvest(lm, texts, hook_name, n_tokens, sizes))
    print(f"# {lm!r}, {hook_name}, {n_batches} batches of {batch_size}x{ctx_len}, {pairs} pairs")
    print(f"# torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("op,shape,dtype,provider,median_tokens_per_s,q20,q80")
    shape = f"{batch_size}x{ctx_len}x{lm.d_in(hook_name)}"
    for provider, seconds in times.items():
        row = ",".join(f"{speed:.0f}" for speed in median_and_quantiles([n_tokens / s for s in seconds]))
        print(f"harvest,{shape},{str(lm.dtype).removeprefix('torch.')},{provider},{row}")
    ratios = [bare / ours for bare, ours in zip(times["bare"], times["harvest"], strict=True)]
    median, low, high = median_and_quantiles(ratios)
    print(f"harvest / bare: {median:.3f} (q20 {low:.3f}, q80 {high:.3f}; target: at least 0.9)")
    return median


def median_and_quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantiles."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


if __name__ == "__main__":
    tyro.cli(main)
