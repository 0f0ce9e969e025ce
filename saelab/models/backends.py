"""Backends for the two kinds of language model: Hugging Face modules, and the TransformerBridge of TransformerLens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import ModelError
from saelab.models.families import context_length, eager, find_decoder, in_eval_mode, rope_border, takes, tolerance
from saelab.models.hook_places import HookPlace, bridge_hook_places, hf_hook_places
from saelab.models.hooks import attach, tapped
from saelab.models.padding import N_TRIED, arguments, honours_padding, is_plain, refuse_unless
from saelab.models.unembedding import between, logit_weights, unembedding_of, watch_head

_STREAM = "hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"


class Backend:
    """Shared by both backends: padding and positions are passed to the model once a probe shows that it honours them."""

    model: Any
    d_vocab: int
    max_ctx: int
    rope_border: int = 2**31
    """Contexts longer than this many tokens use different position frequencies (LongRoPE)."""
    has_cache: Any
    forward: Any

    def _some_ids(self, n: int) -> Int[Tensor, "1 n"]:
        """Arbitrary token ids, to probe the model with."""
        device = next(self.model.parameters()).device
        return (torch.arange(n, device=device)[None] * 7 + self.d_vocab // 3) % self.d_vocab

    @cached_property
    def honours_padding(self) -> bool:
        """Whether rows may be padded on the left."""
        with torch.inference_mode(), in_eval_mode(self.model):
            return honours_padding(self.model, self.forward, self._some_ids(min(N_TRIED, self.max_ctx)), self.has_cache)

    def prepare(self, positions: Int[Tensor, "batch seq"] | None) -> None:
        """First run the probe that a pass with these positions needs, so that it does not run under the hooks of that pass.

        Raises `ModelError` for rows on both sides of `rope_border`.
        """
        if positions is not None and positions.shape[1] > self.rope_border:
            lengths = positions.max(1).values + 1
            if int(lengths.min()) <= self.rope_border < int(lengths.max()):
                raise ModelError(
                    f"{type(self.model).__name__} reads contexts of over {self.rope_border} tokens with other position "
                    "frequencies, and all rows of a batch with those of its longest row: put shorter rows in their own batch."
                )
        if positions is not None and not is_plain(positions):
            _ = self.honours_padding

    def probe(self) -> list[float]:
        """16 of the logits after 16 tokens, divided by the largest absolute logit."""
        ids = self._some_ids(min(16, self.max_ctx))
        last = self.forward(ids, None, False)[0][0, -1].float()
        chosen = last[torch.linspace(0, len(last) - 1, 16, device=last.device).long()]
        return [round(float(value), 6) for value in chosen / last.abs().max().clamp_min(1e-30)]

    def _told(self, positions: Int[Tensor, "batch seq"] | None, past: int = 0) -> dict[str, Tensor]:
        """Forward arguments for these positions. Raises `ModelError` if the model does not honour them."""
        if positions is None or is_plain(positions):
            return {}
        refuse_unless(self.honours_padding, self.model, positions)
        device = next(self.model.parameters()).device  # a harvest leaves positions on the CPU
        return {name: told.to(device) for name, told in arguments(self.model, positions, past).items()}

    def logits(
        self, ids: Int[Tensor, "batch seq"], positions: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits at every token; `positions` are -1 on padding."""
        return self.forward(ids, None, False, **self._told(positions))[0]


class HFBackend(Backend):
    """A Hugging Face decoder: fast, read and edited through forward hooks. Raises `ModelError` for any other kind of model."""

    def __init__(self, model: Any) -> None:
        self.model = eager(model)
        self.decoder = find_decoder(self.model)
        config = self.decoder.config
        self.n_layers, self.d_model = int(config.num_hidden_layers), int(config.hidden_size)
        self.d_vocab = int(config.vocab_size)
        self.max_ctx = context_length(self.model, config)
        self.n_heads = int(getattr(config, "num_attention_heads", 0) or 0)
        self.rope_border = rope_border(config)
        self._quiet = {"use_cache": False} if takes(self.model, "use_cache") else {}
        self._last_only = {"logits_to_keep": 1} if takes(self.model, "logits_to_keep") else {}
        self.hook_places: dict[str, HookPlace] = hf_hook_places(self.decoder)
        if not self._blocks_add_up():
            self.hook_places = hf_hook_places(self.decoder, with_submodules=False)

    def _blocks_add_up(self) -> bool:
        """Whether attention and MLP are where the family's names say: their outputs add up to the change in the stream."""
        pre, attention, mlp, post = (f"blocks.0.{name}" for name in _STREAM)
        if attention not in self.hook_places:
            return True
        seen: dict[str, Tensor] = {}
        ids = self._some_ids(4)
        with (
            torch.inference_mode(),
            in_eval_mode(self.model),
            tapped(self.hook_places, None, (pre, attention, mlp, post), seen),
        ):
            self.trunk(ids)
        by = float(getattr(self.decoder.config, "residual_multiplier", 1.0))  # Granite
        risen = seen[pre].float() + by * (seen[attention].float() + seen[mlp].float())
        return float((risen - seen[post].float()).abs().max()) <= tolerance(seen[post])

    def trunk(self, ids: Int[Tensor, "batch seq"], positions: Int[Tensor, "batch seq"] | None = None) -> None:
        """A forward pass that computes no logits."""
        self.model.base_model(input_ids=ids, **self._quiet, **self._told(positions))

    def forward(self, ids: Int[Tensor, "batch seq"], cache: Any, with_cache: bool, **told: Any) -> tuple[Tensor, Any]:
        """Logits of all `ids` (of the last only, if `told` says so), and the KV cache if `with_cache`."""
        keep = {"past_key_values": cache, "use_cache": True} if with_cache else self._quiet
        output = self.model(input_ids=ids, **keep, **told)
        return output.logits, output.past_key_values if with_cache else None

    def step(
        self, ids: Int[Tensor, "batch seq"], positions: Int[Tensor, "batch seq"], cache: Any
    ) -> tuple[Float[Tensor, "batch vocab"], Any]:
        """Logits after the last of `ids`, and the KV cache, with which only new tokens are run; None if unsupported."""
        past = 0 if cache is None else cache.get_seq_length()
        told = self._told(positions, past) | self._last_only
        with _contiguous_input(self.model.get_output_embeddings() if past == 0 and len(ids) > 1 else None):
            logits, cache = self.forward(ids[:, past:], cache, self.has_cache, **told)
        return logits[:, -1], cache

    @cached_property
    def has_cache(self) -> bool:
        """Whether tokens can be run one at a time with a KV cache: a probe checks that the logits are the same."""
        if not (takes(self.model, "past_key_values") and takes(self.model, "use_cache")):
            return False
        ids = self._some_ids(4)
        with torch.inference_mode(), in_eval_mode(self.model):
            uncached = self.logits(ids)[:, -1]
            try:
                cache = self.forward(ids[:, :3], None, True)[1]
                if cache is None or cache.get_seq_length() != 3:
                    return False
                last = self.forward(ids[:, 3:], cache, True)[0][:, -1]
            except (AttributeError, TypeError, ValueError):  # the state of a recurrent model has no length
                return False
        return float((uncached - last).abs().max()) <= tolerance(uncached)

    def logit_weights(self) -> Float[Tensor, "vocab d_model"]:
        """Unembedding in fp32 with the final norm folded in. Raises `ModelError` if it cannot be determined."""
        ids = self._some_ids(8)
        with torch.inference_mode(), in_eval_mode(self.model):
            head = watch_head(self.model, self.decoder.layers[-1], lambda: self.logits(ids))
        norm, unembed = between(head.modules), unembedding_of(self.model.get_output_embeddings())
        if not isinstance(unembed, Tensor):
            raise ModelError(
                f"The unembedding of {type(self.model).__name__} is quantised: load the model unquantised."
            )
        last, raw = head.last[0].cpu(), head.raw[0].cpu()
        return logit_weights(unembed.cpu(), norm, self.d_model, last, raw, type(self.model).__name__)


@contextmanager
def _contiguous_input(head: nn.Module | None) -> Iterator[None]:
    """The unembedding is applied to a copy of its input: to the last tokens of several prompts where they stand, torch applies
    it row by row, which takes longer than all the steps that follow."""
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, given: tuple(one.contiguous() for one in given))
    try:
        yield
    finally:
        handle.remove()


class BridgeBackend(Backend):
    """A TransformerBridge, whose hook points are already modules."""

    has_cache = False

    def __init__(self, model: Any) -> None:
        self.model, config = model, model.cfg
        self.n_layers, self.d_model, self.d_vocab = config.n_layers, config.d_model, config.d_vocab
        self.n_heads, self.max_ctx = config.n_heads, config.n_ctx or 2**31
        self.hook_places: dict[str, HookPlace] = bridge_hook_places(model)

    def trunk(self, ids: Int[Tensor, "batch seq"], positions: Int[Tensor, "batch seq"] | None = None) -> None:
        """A forward pass; a bridge computes logits unless a capture ends the pass first."""
        self.logits(ids, positions)

    def forward(self, ids: Int[Tensor, "batch seq"], cache: Any, with_cache: bool, **told: Any) -> tuple[Tensor, Any]:
        """Logits of all `ids`; a bridge has no KV cache."""
        return self.model(ids, return_type="logits", **told), None

    def step(
        self, ids: Int[Tensor, "batch seq"], positions: Int[Tensor, "batch seq"], cache: Any
    ) -> tuple[Float[Tensor, "batch vocab"], Any]:
        """Logits after the last of `ids`; all of them are run."""
        return self.logits(ids, positions)[:, -1], None

    def logit_weights(self) -> Float[Tensor, "vocab d_model"]:
        """Unembedding in fp32 with the final norm folded in. Raises `ModelError` if that does not reproduce the logits."""
        ids = self._some_ids(8)
        last: list[Tensor] = []
        point = self.hook_places[f"blocks.{self.n_layers - 1}.hook_resid_post"]
        handle = attach(point, last.append)[0]
        try:
            with torch.inference_mode(), in_eval_mode(self.model):
                raw = self.logits(ids)[0].cpu()
        finally:
            handle.remove()
        norm = getattr(self.model, "ln_final", None)
        modules = [norm] if isinstance(norm, nn.Module) else []
        name = type(self.model).__name__
        return logit_weights(self.model.W_U.T.cpu(), between(modules), self.d_model, last[0][0].cpu(), raw, name)


def backend_of(model: Any) -> HFBackend | BridgeBackend:
    """The backend of a built model."""
    return BridgeBackend(model) if hasattr(model, "hook_dict") else HFBackend(model)
