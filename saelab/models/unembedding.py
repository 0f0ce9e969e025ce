"""The unembedding as a linear map on the residual stream, so that a direction can be read as token logits.

The modules between the last layer and the unembedding are not recognised by name: they are run. A norm is a linear map of
its input divided by the input's size, and the map is read off its outputs for unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.errors import ModelError

_CHUNK = 1024
_SIZE = 100.0  # of the inputs a norm is probed with: its epsilon is negligible in comparison
_AGREEMENT = 0.99  # minimum correlation with the model's own logits


@torch.no_grad()
def logit_weights(
    unembed: Float[Tensor, "vocab d_head"],
    norm: Callable[[Tensor], Tensor],
    d_model: int,
    last: Float[Tensor, "n d_model"],
    logits: Float[Tensor, "n vocab"],
    name: str,
) -> Float[Tensor, "vocab d_model"]:
    """fp32 unembedding with the map of the final `norm` folded in; its division, a factor common to all tokens, is left out.

    `last` are residual streams after the last layer, `logits` the unembedding's outputs for them. Raises `ModelError` if
    the map does not agree with those.
    """
    centred, divides = _kind(norm, d_model)
    matrix = _linear_part(norm, d_model, centred, divides)
    gain = matrix.diagonal() / ((1 - 1 / d_model) if centred else 1)
    plain = torch.diag(gain) - (gain[:, None] / d_model if centred else 0) if matrix.shape[0] == d_model else None
    weights = unembed.detach().float()
    if plain is not None and torch.allclose(matrix, plain, atol=1e-4 * float(matrix.abs().max())):
        weights = weights * gain
        weights = weights - weights.mean(1, keepdim=True) if centred else weights
    else:
        weights = weights @ matrix
    _check(weights, last.float(), logits.float(), centred, divides, name)
    return weights


def _kind(norm: Callable[[Tensor], Tensor], d_model: int) -> tuple[bool, bool]:
    """Whether the norm subtracts the mean of its input, and whether it divides by the input's size."""
    x = torch.randn(d_model, generator=torch.Generator().manual_seed(0)) * _SIZE
    there, shifted = norm(x[None]), norm((x + _SIZE)[None])
    centred = torch.allclose(there, shifted, rtol=1e-3, atol=1e-3 * float(there.abs().max()))
    odd, twice = norm(x[None]) - norm(-x[None]), norm(2 * x[None]) - norm(-2 * x[None])
    return centred, torch.allclose(odd, twice, rtol=1e-3, atol=1e-3 * float(odd.abs().max()))


def _linear_part(
    norm: Callable[[Tensor], Tensor], d_model: int, centred: bool, divides: bool
) -> Float[Tensor, "d_head d_model"]:
    """Column i is the output for unit vector i, times the size that it was divided by."""
    share = (1 - 1 / d_model if centred else 1.0) / d_model
    size = share**0.5 if divides else 1 / _SIZE
    parts = []
    for start in range(0, d_model, _CHUNK):
        unit = torch.zeros(min(_CHUNK, d_model - start), d_model)
        unit.fill_diagonal_(0)
        unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = _SIZE
        parts.append((norm(unit) - norm(-unit)) / 2 * size)
    return torch.cat(parts).T


def _check(weights: Tensor, last: Tensor, logits: Tensor, centred: bool, divides: bool, name: str) -> None:
    """Check that the model's logits differ between tokens as the map predicts. Raises `ModelError` if they do not."""
    x = last - last.mean(1, keepdim=True) if centred else last
    x = x / x.square().mean(1, keepdim=True).sqrt() if divides else x
    expected, found = (x[1:] - x[0]) @ weights.T, logits[1:] - logits[0]
    agreement = min(
        float(torch.corrcoef(torch.stack([one, other]))[0, 1]) for one, other in zip(expected, found, strict=True)
    )
    if not agreement >= _AGREEMENT:
        raise ModelError(
            f"The unembedding of {name} is not the linear map that saelab derived (correlation {agreement:.3f} with the change "
            "of the model's own logits, expected 1): directions of this model cannot be read as tokens."
        )


def between(modules: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """One function, fp32 in and out, made of the modules that ran between the last layer and the unembedding."""

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            for module in modules:
                weight = next(module.parameters(), None)
                where = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
                x = module(x.to(**where))
        return x.float().cpu()

    return run


@torch.no_grad()
def unembedding_of(head: nn.Module) -> Any:
    """The matrix `(vocab, d_head)` of an unembedding; for one with modules inside (an adapter), read off its outputs."""
    weight: Any = head.weight
    if not isinstance(weight, Tensor) or not any(True for _ in head.children()):
        return weight
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return (head(unit).float() - head(torch.zeros_like(unit[:1])).float()).T


class HeadPass(NamedTuple):
    """The path from the last layer to the logits, as recorded in one pass."""

    modules: list[nn.Module]
    """The outermost modules that were called in between."""
    last: Tensor
    """Output of the last layer."""
    raw: Tensor
    """Output of the unembedding."""
    logits: Tensor
    """The model's logits: `raw`, possibly scaled or capped, in the same order."""


def watch_head(model: Any, last_layer: nn.Module, run: Callable[[], Tensor]) -> HeadPass:
    """Record one pass, `run`, which returns logits. Raises `ModelError` unless logits increase with the unembedding's output."""
    head, tensors, finished = model.get_output_embeddings(), {}, list[nn.Module]()
    running: list[tuple[nn.Module, list[nn.Module]]] = []  # each with its finished calls

    def enter(module: nn.Module, _args: tuple) -> None:
        if "last" not in tensors or "raw" in tensors:
            return
        if module is head:  # inside modules that contain it: count their finished calls
            finished.extend(one for _, calls in running for one in calls)
            running.clear()
        else:
            running.append((module, []))

    def leave(module: nn.Module, _args: tuple, output: Any) -> None:
        if module is last_layer:
            tensors["last"] = output[0] if isinstance(output, tuple) else output
            running.clear()
            finished.clear()
        elif module is head:
            tensors.setdefault("raw", output)
        elif running and running[-1][0] is module:
            running.pop()
            (running[-1][1] if running else finished).append(module)

    inner = {id(part) for one in (last_layer, head) for part in one.modules()} - {id(last_layer), id(head)}
    handles = []
    for module in model.modules():
        if id(module) not in inner:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    if tensors.keys() != {"last", "raw"} or not _same_order(tensors["raw"], logits):
        raise ModelError(
            f"{type(model).__name__} does not compute its logits with an unembedding after its last layer."
        )
    return HeadPass(finished, tensors["last"], tensors["raw"], logits)


def _same_order(raw: Tensor, logits: Tensor) -> bool:
    """Whether logits increase with `raw`, up to rounding."""
    if raw.shape != logits.shape:
        return False
    ordered = logits.float().gather(-1, raw.float().argsort(-1))
    falls = (ordered[..., :-1] - ordered[..., 1:]).amax()
    return float(falls) <= 0.02 * float(ordered.amax() - ordered.amin())
