"""Finding the decoder of a Hugging Face model by running it once when it is loaded: family names and configs are only hints.

Refused here, before any work is done: models that are not causal language models, that do not run on token ids alone, or
whose layers do not pass the residual stream from one to the next.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saelab.errors import ModelError

_N = 5  # tokens in each of the probe's two contexts, which differ in the last one


class Decoder(NamedTuple):
    """The text decoder of a model."""

    config: Any
    """Its own config; in a multimodal model, the text part."""
    layers: nn.ModuleList


class Stream(NamedTuple):
    """Inputs and outputs of a list of layers in one pass, `(batch, seq, d_model)` by layer index."""

    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]
    calls: Counter[int]
    """How often each layer ran."""

    def is_passed_on(self, n_layers: int) -> bool:
        """Whether every layer ran once, on the output of the one before: an edit in a loop would apply several times."""
        if not len(self.inputs) == len(self.outputs) == n_layers or set(self.calls.values()) != {1}:
            return False
        pairs = [(self.outputs[i], self.inputs[i + 1]) for i in range(n_layers - 1)]
        return all(x.shape == y.shape and float((x - y).abs().max()) <= tolerance(x) for x, y in pairs)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run without dropout, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def eager(model: Any) -> Any:
    """The uncompiled model: a compiled one skips hooks that are added after compilation.

    Raises `ModelError` if a part of it was compiled in place.
    """
    model = getattr(model, "_orig_mod", model)
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"{type(model).__name__} was compiled in place ({name or 'the whole model'}): compiled code bypasses hooks. "
                "Give the model as it was before compilation."
            )
    return model


def find_decoder(model: Any) -> Decoder:
    """The decoder's config and its list of layers, checked against what the model itself computes.

    Raises `ModelError` with the reason for a model that saelab cannot read.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; saelab reads causal language models (decoders).")
    away = [part for part, weight in model.named_parameters() if weight.is_meta]
    if away:
        raise ModelError(
            f"{name} is offloaded: {len(away)} of its weights, starting with {away[0]}, are not in memory. Load all of it, "
            "in a smaller dtype or on a larger device."
        )
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not lists:
        raise ModelError(
            f"{name} has no list of {config.num_hidden_layers} layers, so saelab cannot place hooks in it."
        )
    ids = _probe_ids(config).to(next(model.parameters()).device)
    streams = [Stream({}, {}, Counter()) for _ in lists]
    _check_causal(name, _run(model, ids, lists, streams))
    for layers, stream in zip(lists, streams, strict=True):
        if stream.is_passed_on(len(layers)):
            return Decoder(config, layers)
    raise ModelError(
        f"{name} does not run its {config.num_hidden_layers} layers one after another, each once, on the output of the one "
        "before for each token; saelab cannot place hooks in it."
    )


def _probe_ids(config: Any) -> Int[Tensor, "2 n"]:
    """Two contexts of ordinary tokens that differ in the last one."""
    special = {value for key, value in config.to_dict().items() if key.endswith("token_id") and isinstance(value, int)}
    start = config.vocab_size // 2
    ids = [
        i % config.vocab_size for i in range(start, start + config.vocab_size) if i % config.vocab_size not in special
    ]
    if len(ids) <= _N:
        raise ModelError(f"The model's vocabulary has {config.vocab_size} tokens, too few to read texts.")
    return torch.tensor([ids[:_N], [*ids[: _N - 1], ids[_N]]])


def _run(model: Any, ids: Tensor, lists: list[nn.ModuleList], streams: list[Stream]) -> Tensor:
    """Logits of one pass, which records the layers' inputs and outputs in `streams`."""

    def note(seen: dict[int, Tensor], i: int, x: Any) -> None:
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == ids.shape:
            seen[i] = x

    handles: list[Any] = []
    for layers, stream in zip(lists, streams, strict=True):
        for i, layer in enumerate(layers):

            def note_input(_module: Any, args: tuple, kwargs: dict, i: int = i, stream: Stream = stream) -> None:
                stream.calls[i] += 1
                note(stream.inputs, i, args[0] if args else kwargs.get("hidden_states"))

            def note_output(_module: Any, _args: tuple, output: Any, i: int = i, stream: Stream = stream) -> None:
                note(stream.outputs, i, output[0] if isinstance(output, tuple) else output)

            handles += [
                layer.register_forward_pre_hook(note_input, with_kwargs=True),
                layer.register_forward_hook(note_output),
            ]
    options = {"use_cache": False} if takes(model, "use_cache") else {}
    try:
        with torch.inference_mode(), in_eval_mode(model):
            output = model(input_ids=ids, **options)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on token ids alone ({type(error).__name__}: {str(error)[:200]}); saelab "
            "reads causal language models that do."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(getattr(output, "logits", None), Tensor) or output.logits.shape[:2] != ids.shape:
        raise ModelError(
            f"{type(model).__name__} returns no logits for each token; saelab reads causal language models."
        )
    return output.logits


def context_length(model: Any, config: Any) -> int:
    """Context length in tokens, according to the model's config and its table of position embeddings."""
    named = ("max_position_embeddings", "max_target_positions", "n_positions")
    length = next((int(n) for name in named if (n := getattr(config, name, None))), 2**31)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "position_embeddings":
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from padding_idx + 1
            length = min(length, module.num_embeddings - first)
    return length


def rope_border(config: Any) -> int:
    """Contexts longer than this many tokens are read with different position frequencies, in all rows of a batch (LongRoPE)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    original = original or getattr(config, "original_max_position_embeddings", None)
    return int(original) if kind == "longrope" and original else 2**31


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward pass has this argument."""
    return argument in inspect.signature(model.forward).parameters


def tolerance(x: Tensor) -> float:
    """A generous bound on rounding differences between numbers of this size and dtype."""
    return max(8 * torch.finfo(x.dtype).eps, 1e-4) * float(x.detach().float().abs().max())


def _check_causal(name: str, logits: Tensor) -> None:
    """Raises `ModelError` if changing the last token changes the logits before it, or logits are not finite."""
    if not bool(logits.isfinite().all()):
        raise ModelError(
            f"{name} computes NaN or infinite logits in {str(logits.dtype).removeprefix('torch.')}: load it in a wider dtype "
            "(dtype=torch.float32), or check its weights."
        )
    change = (logits[0].float() - logits[1].float()).abs()
    moved, at_last = float(change[: _N - 1].max()), float(change[_N - 1].max())
    if not moved <= min(tolerance(logits), 0.02 * at_last):  # in one pass a decoder's are mostly bit-identical
        raise ModelError(
            f"{name} is not a causal language model: changing the last token changes earlier logits by {moved:.2g}. Give a "
            "decoder."
        )
