"""`LanguageModel`: one interface to a causal language model, run by Hugging Face modules or by a TransformerBridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.models.backends import BridgeBackend, backend_of
from saelab.models.families import in_eval_mode
from saelab.models.generation import Generates
from saelab.models.hashing import (
    checksum,
    hash_config,
    hash_folder,
    hash_model,
    hash_tokenizer,
    hash_tokenizer_files,
    state_mark,
    stored_weights,
)
from saelab.models.hook_places import HookPlace
from saelab.models.hooks import hook_list, is_plain_mistake, tapped, unknown_hook
from saelab.models.model_lock import ModelLock
from saelab.models.prompts import Batch, Prompt, check_batch, several, to_batch
from saelab.models.steers import Steers
from saelab.tokens.tokenizing import special_tokens


class LanguageModel(Generates, Steers):
    """A causal language model with named hooks. Made by `load_model`; direct calls to the raw module `model` are not edited.

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
        self._key, self._lock = object(), ModelLock()
        self._tallies = {}
        self._widths: dict[str, int] = {}
        self._hash: str | None = None
        self._stored = None if folder is None else stored_weights(folder)
        self._bridge_now: BridgeBackend | None = None
        self._checksum = "" if folder is None else checksum(self.model)
        self._bridged = ""

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"LanguageModel({self.name!r}: {self.n_layers} layers, d_model {self.d_model}, {kind} on {self.device})"

    # --- identity

    @property
    def bos_id(self) -> int | None:
        """BOS id, from the tokenizer's current state (from the model's config without a tokenizer)."""
        return special_tokens(self.tokenizer, self.model)[0]

    @property
    def eos_id(self) -> int | None:
        """EOS id, found in the same way."""
        return special_tokens(self.tokenizer, self.model)[1]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """All special token ids, ascending."""
        return special_tokens(self.tokenizer, self.model)[2]

    @property
    def hash(self) -> str:
        """SHA-256 of the weights (names, dtypes, shapes, bytes): as stored, if the model was loaded from a folder, whatever
        dtype it runs in; otherwise, or if the weights have been changed since, of the module's state."""
        now = checksum(self.model)
        if now != self._checksum:
            self._folder, self._hash, self._checksum = None, None, now
        if self._hash is None:
            unchanged = self._folder is not None and stored_weights(self._folder) == self._stored
            self._hash = (hash_folder(self._folder) if self._folder and unchanged else None) or hash_model(self.model)
        return self._hash

    @property
    def config_hash(self) -> str:
        """SHA-256 of what affects the model's outputs in its config: the same weights can compute a different function."""
        return hash_config(self.model)

    @property
    def logits_probe(self) -> list[float]:
        """A few logits of the model as it runs now, including hooks or settings that the caller added to it."""
        with self._running():
            return self.backend.probe()

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's current content; "" for a model without one."""
        return hash_tokenizer(self.tokenizer)

    @property
    def tokenizer_files(self) -> str:
        """SHA-256 of the files of a tokenizer without a fast version; "" for any other."""
        return hash_tokenizer_files(self.tokenizer)

    def weights_changed(self) -> None:
        """Forget what was derived from the old weights, after training them in place."""
        self._folder, self._hash, self._bridge_now = None, None, None

    # --- hooks

    @property
    def hook_names(self) -> list[str]:
        """Hooks that can be read fast and edited, in forward order. Any other TransformerLens name can be read too."""
        return list(self.backend.hook_places)

    def check_hook(self, hook_name: str) -> None:
        """Raises `ValueError` if the model has no such hook, naming the nearest ones."""
        self._hook_places_of([hook_name])

    def d_in(self, hook_name: str) -> int:
        """Width of the activations at a hook (heads are flattened)."""
        if hook_name not in self._widths:
            probe = torch.zeros(1, 1, dtype=torch.int64)
            self._widths[hook_name] = self._capture(probe, probe, [hook_name], edited=False)[hook_name].shape[-1]
        return self._widths[hook_name]

    def stream_activations(self, batches: Any, hook_names: str | Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Activations (batch, seq, d_in) in the model's dtype at each hook, for each batch; a batch is any `to_batch` input.

        A text, a tensor of ids or a tokenizer's output on its own is one batch.
        The pass ends after the last hook that is read. Active edits apply. The tensors are inference tensors:
        `.clone()` one before differentiating through it. Raises `ValueError` for an unknown hook.
        """
        names = hook_list(hook_names)
        self._hook_places_of(names)
        listed = [batches] if isinstance(batches, np.ndarray) else several(batches, "batches")
        return (self._capture(*self.to_batch(ids), names) for ids in listed)

    def _capture(self, ids: Tensor, positions: Tensor, names: list[str], edited: bool = True) -> dict[str, Tensor]:
        hook_places = self._hook_places_of(names)
        captured: dict[str, Tensor] = {}
        ids, here = ids.to(self.device), positions.to(self.device)
        backend = self.backend if hook_places is self.backend.hook_places else self._bridge
        backend.prepare(positions)
        with self._running(), tapped(hook_places, self._pass(ids, here) if edited else None, names, captured):
            backend.trunk(ids, positions)
        for name in names:
            if captured[name].ndim < 3 or captured[name].shape[:2] != ids.shape:
                shape = tuple(captured[name].shape)
                raise ValueError(f"hook_name={name!r} has shape {shape}, not one vector per token. Choose another.")
        return {name: captured[name].flatten(2) for name in names}

    @contextmanager
    def _running(self, generating: bool = False) -> Iterator[None]:
        """The context of every pass: lock, inference mode, no dropout; edits are reported. The model's state is restored."""
        with self._lock, torch.inference_mode(), in_eval_mode(self.model), self._reported(generating):
            yield

    @property
    def _bridge(self) -> BridgeBackend:
        """A TransformerBridge on a copy of the model in its current state: booting changes the modules in place."""
        mark = state_mark(self.model)
        if self._bridge_now is None or mark != self._bridged:
            assert self._boot_bridge is not None
            self._bridge_now, self._bridged = BridgeBackend(self._boot_bridge()), mark
        return self._bridge_now

    def _hook_places_of(self, names: Sequence[str]) -> dict[str, HookPlace]:
        """The hook places that include all `names`: the fast ones, or else the bridge's, booted when first needed."""
        slow = [name for name in names if name not in self.backend.hook_places]
        if not slow:
            return self.backend.hook_places
        for name in slow:
            if self._boot_bridge is None or not isinstance(name, str) or is_plain_mistake(name, self.hook_names):
                raise unknown_hook(name, self.hook_names, self.name)
        hook_places = self._bridge.hook_places
        for name in slow:
            if name not in hook_places:
                raise unknown_hook(name, list(hook_places), self.name)
        return hook_places

    # --- tokens

    def to_batch(self, prompt: Prompt, positions: Any = None, attention_mask: Any = None) -> Batch:
        """Token ids and positions (batch, seq) of a text, a list of texts (padded on the right, position -1 there), token ids
        in a list, array or tensor, or what a tokenizer returns, with its attention mask.

        A text is preceded by what the tokenizer itself puts in front of it, never twice; what it appends is left out.
        `positions` (-1 on padding) or `attention_mask` say which of the given ids are padding. Raises `ValueError` for an
        empty text, an id outside the vocabulary, more tokens than the context, and anything that is not a prompt.
        """
        batch = to_batch(prompt, self.tokenizer, self.eos_id, positions, attention_mask)
        check_batch(batch, self.name, self.max_ctx, self.d_vocab)
        return batch

    def to_ids(self, prompt: Prompt) -> Int[Tensor, "batch seq"]:
        """Token ids (batch, seq); see `to_batch`."""
        return self.to_batch(prompt)[0]

    def chat(self, messages: str | Sequence[dict[str, str]]) -> str:
        """A conversation as prompt text, rendered with the tokenizer's chat template, ready for the assistant's turn.

        `messages` are `{"role", "content"}` dicts, or one user message. Raises `ValueError` without a template.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(f"The tokenizer of {self.name} has no chat template; give plain text instead.")
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    # --- running

    def logits(
        self, text_or_ids: Prompt, positions: Any = None, attention_mask: Any = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits in the model's dtype. Active edits apply, and are given the same positions as the model.

        Arguments are those of `to_batch`. Raises `ModelError` for NaN or infinite logits of a token, and for padding in front
        of tokens if the model cannot ignore it.
        """
        batch = self.to_batch(text_or_ids, positions, attention_mask)
        self.backend.prepare(batch.positions)
        ids, positions = (x.to(self.device) for x in batch)
        with self._running(), tapped(self.backend.hook_places, self._pass(ids, positions)):
            logits = self.backend.logits(ids, positions)
            self._check_finite(logits.amax(-1)[positions >= 0], "")
            return logits
        raise AssertionError("no capture can cut this pass")

    def logit_weights(self) -> Float[Tensor, "vocab d_model"]:
        """Unembedding in fp32, final norm's gain and centring folded in: `weights @ direction` ranks the tokens.

        Raises `ModelError` if the model's own logits do not agree with it.
        """
        with self._lock:
            return self.backend.logit_weights()
