"""`LanguageModel`: one face for a causal language model, run by Hugging Face modules or by a TransformerBridge."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.backends import BridgeBackend, backend_of
from saelab.families import in_eval_mode
from saelab.hooks import Edit, Site, hook_list, is_plain_mistake, tapped, unknown_hook
from saelab.model_hash import hash_folder, hash_model, hash_tokenizer
from saelab.prompts import Prompt, check_ids, special_token_ids, to_batch
from saelab.sampling import Generation, OnToken, check_generation, sample


class LanguageModel:
    """A causal language model with named hooks. Made by `load_model`; `model` is the raw module, which no edit reaches.

    A thread that steers, or runs one forward pass, holds the model's lock: no thread sees another's edits.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        folder: Path | None = None,
        boot_bridge: Callable[[], Any] | None = None,
    ):
        self.tokenizer, self.name = tokenizer, name
        self._folder, self._boot_bridge = folder, boot_bridge
        self.backend = backend_of(model)
        self.model = self.backend.model
        self.n_layers, self.d_model = self.backend.n_layers, self.backend.d_model
        self.d_vocab, self.max_ctx = self.backend.d_vocab, self.backend.max_ctx
        weight = next(self.model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.bos_id: int | None = getattr(tokenizer, "bos_token_id", None)
        self.eos_id: int | None = getattr(tokenizer, "eos_token_id", None)
        self.special_ids: tuple[int, ...] = special_token_ids(tokenizer)
        self._blocks: tuple[list[Edit], ...] = ()  # of `steer`, each with its edits
        self._lock = threading.RLock()
        self._widths: dict[str, int] = {}

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"LanguageModel({self.name!r}: {self.n_layers} layers, d_model {self.d_model}, {kind} on {self.device})"

    # --- identity

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights (names, dtypes, shapes, bytes): as stored in the folder when the model came from one,
        whatever dtype it runs in; of the module's state otherwise."""
        return (hash_folder(self._folder) if self._folder else None) or hash_model(self.model)

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's content; "" for a model without one."""
        return hash_tokenizer(self.tokenizer)

    def weights_changed(self) -> None:
        """Forget what came from the old weights (hash, bridge), after they were trained in place."""
        self._folder, _, _ = None, self.__dict__.pop("hash", None), self.__dict__.pop("_bridge", None)

    # --- hooks

    @property
    def hook_names(self) -> list[str]:
        """Hooks that can be read fast and edited, in forward order. Any other TransformerLens name can be read too."""
        return list(self.backend.sites)

    def check_hook(self, hook_name: str) -> None:
        """Raises `ValueError` when the model has no such hook, nearest names first."""
        self._sites_of([hook_name])

    def d_in(self, hook_name: str) -> int:
        """Width of the activations at a hook (heads are flattened)."""
        if hook_name not in self._widths:
            probe = torch.zeros(1, 1, dtype=torch.int64)
            self._widths[hook_name] = self._capture(probe, [hook_name], edited=False)[hook_name].shape[-1]
        return self._widths[hook_name]

    def stream_activations(
        self, batches: Iterable[Int[Tensor, "_ _"]], hook_names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Activations (batch, seq, d_in) in the model's dtype at each hook, for each batch of token ids.

        The pass ends after the last hooked place. Active edits are honoured. The tensors are inference tensors:
        `.clone()` one before differentiating through it. Raises `ValueError` for an unknown hook.
        """
        names = hook_list(hook_names)
        self._sites_of(names)
        return (self._capture(self._checked(ids), names) for ids in batches)

    def _capture(self, ids: Tensor, names: list[str], edited: bool = True) -> dict[str, Tensor]:
        sites = self._sites_of(names)
        captured: dict[str, Tensor] = {}
        ids = ids.to(self.device)
        backend = self.backend if sites is self.backend.sites else self._bridge
        with self._running(), tapped(sites, self.edits if edited else (), _positions(ids), names, captured):
            backend.trunk(ids)
        for name in names:
            if captured[name].ndim < 3 or captured[name].shape[:2] != ids.shape:
                shape = tuple(captured[name].shape)
                raise ValueError(f"hook_name={name!r} holds {shape}, not one vector for each token. Choose another.")
        return {name: captured[name].flatten(2) for name in names}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """What every pass of the model is surrounded by; the model is afterwards as it was."""
        with self._lock, torch.inference_mode(), in_eval_mode(self.model):
            yield

    @cached_property
    def _bridge(self) -> BridgeBackend:
        """A TransformerBridge on a copy of the model: booting edits the modules in place."""
        assert self._boot_bridge is not None
        return BridgeBackend(self._boot_bridge())

    def _sites_of(self, names: Sequence[str]) -> dict[str, Site]:
        """The sites that hold all `names`: the fast ones, or else the bridge's, booted when first needed."""
        slow = [name for name in names if name not in self.backend.sites]
        if not slow:
            return self.backend.sites
        for name in slow:
            if self._boot_bridge is None or not isinstance(name, str) or is_plain_mistake(name, self.hook_names):
                raise unknown_hook(name, self.hook_names, self.name)
        sites = self._bridge.sites
        for name in slow:
            if name not in sites:
                raise unknown_hook(name, list(sites), self.name)
        return sites

    # --- tokens

    def to_batch(self, prompt: Prompt) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Token ids and positions of a text, a list of texts (padded on the right, position -1 there), or token ids.

        Special tokens are added as the tokenizer does by itself, never twice. Raises `ValueError` for an empty text, an
        id outside the vocabulary, or more tokens than the context.
        """
        ids, positions = to_batch(prompt, self.tokenizer, self.eos_id)
        return self._checked(ids), positions

    def to_ids(self, prompt: Prompt) -> Int[Tensor, "batch seq"]:
        """Token ids (batch, seq); see `to_batch`."""
        return self.to_batch(prompt)[0]

    def chat(self, messages: str | Sequence[dict[str, str]]) -> str:
        """The prompt text of a conversation, by the tokenizer's chat template, ready for the assistant's turn.

        `messages` are `{"role", "content"}` dicts, or the user's words. Raises `ValueError` without a template.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(f"The tokenizer of {self.name} has no chat template; give plain text instead.")
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _checked(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.name, self.max_ctx, self.d_vocab)
        return ids

    # --- running

    def logits(
        self, text_or_ids: Prompt, positions: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits in the model's dtype. Active edits are honoured; `positions` (-1 on padding) are what they see."""
        ids, counted = self.to_batch(text_or_ids)
        ids, positions = ids.to(self.device), (counted if positions is None else positions).to(self.device)
        with self._running(), tapped(self.backend.sites, self.edits, positions):
            return self.backend.logits(ids)
        raise AssertionError("no capture can cut this pass")

    def run_with_edit(self, text_or_ids: Prompt, edits: Edit | Sequence[Edit]) -> Float[Tensor, "batch seq vocab"]:
        """Logits with these edits, on top of those already active."""
        with self.steer(*(edits if isinstance(edits, Sequence) else [edits])):
            return self.logits(text_or_ids)

    @contextmanager
    def steer(self, *edits: Edit) -> Iterator[LanguageModel]:
        """Apply edits to everything this model computes inside the block. Blocks may be nested: all edits then act.

        Raises `ValueError` for an edit at a hook that cannot be edited, or of another width than the hook's.
        """
        with self._lock:
            for edit in edits:
                self._check_edit(edit)
            block = list(edits)
            self._blocks = (*self._blocks, block)
            try:
                yield self
            finally:  # its own alone: blocks may end in another order than they began
                self._blocks = tuple(other for other in self._blocks if other is not block)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in force: those of the enclosing `steer` blocks."""
        return tuple(edit for block in self._blocks for edit in block)

    def _check_edit(self, edit: Any) -> None:
        if not isinstance(getattr(edit, "hook_name", None), str) or not callable(getattr(edit, "apply", None)):
            raise ValueError(
                f"steer got {edit!r}; an edit has a hook_name and apply(x, positions). Try `feature * 2.0`."
            )
        if edit.hook_name not in self.backend.sites:
            raise unknown_hook(edit.hook_name, self.hook_names, f"what can be edited in {self.name}")
        width, d_in = getattr(edit, "d_in", None), self.d_in(edit.hook_name)
        if width is not None and width != d_in:
            raise ValueError(
                f"The edit is made for activations of width {width}, but {edit.hook_name} of {self.name} has width "
                f"{d_in}. Use an SAE or vector that belongs to this hook."
            )

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> str:
        """The prompt and what the model writes after it, until EOS or `max_new_tokens`.

        Temperature 0 takes the most likely token. On one seed every run draws the same random numbers, steered or not.
        `on_token(n)` is called once n tokens are written; what it raises ends the generation.
        """
        generation = self.generate_ids(prompt, max_new_tokens, temperature, seed, on_token=on_token)
        start, whole = (
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (generation.ids[: generation.n_prompt], generation.ids)
        )
        return (prompt if isinstance(prompt, str) else start) + whole[len(start) :]

    def generate_ids(
        self,
        prompt: Prompt,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        keep_logits: bool = False,
        on_token: OnToken | None = None,
    ) -> Generation:
        """`generate` as token ids, with the logits of each step on request. Active edits are honoured."""
        ids = self.to_ids(prompt).to(self.device)
        check_generation(ids, max_new_tokens, temperature, self.max_ctx, self.name)
        _ = self.backend.has_cache  # tried before any edit is in place
        with self._running():
            return sample(self._step, ids, max_new_tokens, temperature, seed, self._stop_ids, keep_logits, on_token)

    @cached_property
    def _stop_ids(self) -> set[int]:
        more = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = more if isinstance(more, (list, tuple)) else [more]
        return {token for token in (self.eos_id, *listed) if token is not None}

    def _step(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last of `ids`; with a KV cache only the new tokens run."""
        past = 0 if cache is None else cache.get_seq_length()
        with tapped(self.backend.sites, self.edits, _positions(ids)[:, past:]):
            logits, cache = self.backend.step(ids, cache)
            return logits[0], cache
        raise AssertionError("no capture can cut a generation step")

    def logit_weights(self) -> Float[Tensor, "vocab d_model"]:
        """Unembedding in fp32, final norm's gain and centring folded in: `weights @ direction` ranks the tokens.

        Raises `ModelError` where the model's own logits do not follow it.
        """
        with self._lock:
            return self.backend.logit_weights()


def _positions(ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
