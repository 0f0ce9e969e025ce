"""Generating from prompts with a language model, under its active edits, as text or as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ModelError
from saelab.models.applying import Block
from saelab.models.hooks import tapped
from saelab.models.prompts import Batch, Prompt
from saelab.models.sampling import Generation, OnStep, OnText, OnToken, Sampling, sample
from saelab.models.steered import Edit, Steering
from saelab.tokens.documents import whole_numbers
from saelab.tokens.tokenizing import to_continue


class Generates:
    """The generation methods of `LanguageModel`."""

    model: Any
    backend: Any
    tokenizer: Any
    name: str
    dtype: Any
    device: Any
    max_ctx: int
    eos_id: int | None
    edits: tuple[Edit, ...]
    _pass: Callable[..., Any]
    _opened: Callable[..., AbstractContextManager[None]]
    _checked: Callable[[Steering], Steering]
    to_batch: Callable[..., Batch]
    _running: Callable[..., AbstractContextManager[None]]

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: OnToken | None = None,
        num_return_sequences: int = 1,
        attention_mask: Any = None,
        on_text: OnText | None = None,
    ) -> Any:
        """The prompt and its continuation, until EOS or `max_new_tokens`, as a string.

        For a list of texts, several rows of ids, or `num_return_sequences` over 1 (all of one prompt, then of the next), a
        list of strings. Temperature 0 takes the most likely token. For a given seed every run draws the same random numbers,
        steered or not, and every prompt the same as it would alone; sequence j of a prompt is that of seed + j.
        `on_token(n)` is called after n new tokens, `on_text(text)` with the text so far; an exception from them ends it.
        Raises `ValueError` for an invalid prompt, a request that cannot be met, or without a tokenizer; `ModelError` for
        NaN or infinite logits.
        """
        if self.tokenizer is None:
            raise ValueError(
                "This model has no tokenizer to write text with: use generate_ids, or load_model(model, tokenizer)."
            )
        rows = self._rows(prompt, attention_mask)
        how = Sampling(max_new_tokens, temperature, seed, num_return_sequences, self.stop_ids)
        is_list = isinstance(prompt, list | tuple) and whole_numbers(prompt) is None
        texts = [one for one in (prompt if is_list else [prompt]) if isinstance(one, str)]
        on_step = self._on_step(on_token, on_text, len(rows) * num_return_sequences, len(rows[0]), texts)
        continued = [
            self._text(one, texts[i // num_return_sequences] if texts else None)
            for i, one in enumerate(self._generate(rows, how, on_step))
        ]
        return continued if is_list or len(continued) > 1 else continued[0]

    def _on_step(
        self, on_token: OnToken | None, on_text: OnText | None, n_texts: int, n_prompt: int, texts: list[str]
    ) -> OnStep | None:
        """What tells both callbacks; a character whose last bytes are still missing is not told."""
        if on_token is None and on_text is None:
            return None
        if on_text is not None and n_texts != 1:
            raise ValueError(f"on_text is told of one text, got {n_texts} to generate: call generate once for each.")

        def told(n: int, ids: Tensor, logits: Tensor) -> None:
            if on_token is not None:
                on_token(n)
            if on_text is not None:
                text = self._text(Generation(ids[0].cpu(), n_prompt, None), texts[0] if texts else None)
                on_text(text.rstrip("\ufffd"))

        return told

    def _text(self, generation: Generation, prompt: str | None) -> str:
        """The generated text; a prompt that was given as text is kept verbatim."""
        text = self.tokenizer.decode(generation.ids, skip_special_tokens=True)
        if prompt is None:
            return text
        start = self.tokenizer.decode(generation.ids[: generation.n_prompt], skip_special_tokens=True)
        return prompt + text[len(start) :]

    def generate_ids(
        self,
        prompt: Prompt,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        keep_logits: bool = False,
        on_token: OnToken | None = None,
        on_step: OnStep | None = None,
    ) -> Generation:
        """`generate` of one prompt as token ids, with the logits of each step on request. Active edits apply.

        `on_step(n, ids, logits)`, instead of `on_token(n)`, is called after n new tokens with all ids (1, seq) and the logits
        (1, vocab) of the last one; when it returns True, the text ends there.
        """
        rows = [self._row(prompt, "generate_ids")]
        how = Sampling(max_new_tokens, temperature, seed, 1, self.stop_ids, keep_logits)
        return self._generate(rows, how, on_step or self._on_step(on_token, None, 1, 0, []))[0]

    def generate_arms(
        self,
        prompt: Prompt,
        arms: Sequence[Steering | None],
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        n_seeds: int = 1,
        keep_logits: bool = False,
        on_token: OnToken | None = None,
        *,
        seeds: Sequence[int] = (),
        on_step: OnStep | None = None,
    ) -> list[list[Generation]]:
        """Continuations of one prompt in one batch, each arm under its own steering (None: unsteered): those of `seed` and the
        `n_seeds - 1` seeds after it, or those of `seeds`. All arms draw the same random numbers. `on_step(n, ids, logits)` is
        called after n new tokens with all ids so far (rows, seq), arm by arm; when it returns True, all end there.

        Raises as `generate_ids` and `steer` do.
        """
        row = self._row(prompt, "generate_arms")
        if not arms or not all(arm is None or isinstance(arm, Steering) for arm in arms):
            raise ValueError(f"arms={arms!r}; expected at least one of Plan([...]) or None (unsteered).")
        n_seeds = len(seeds) or n_seeds
        how = Sampling(max_new_tokens, temperature, seed, n_seeds, self.stop_ids, keep_logits, seeds)
        blocks = [
            Block(self._checked(arm), tuple(range(i * n_seeds, (i + 1) * n_seeds)))
            for i, arm in enumerate(arms)
            if arm is not None
        ]

        def told(n: int, ids: Tensor, logits: Tensor) -> bool | None:
            if on_token is not None:
                on_token(n)
            return None if on_step is None else on_step(n, ids, logits)

        with self._opened(blocks):
            found = self._generate([row] * len(arms), how, told)
        return [found[i * n_seeds : (i + 1) * n_seeds] for i in range(len(arms))]

    def _row(self, prompt: Prompt, call: str) -> Tensor:
        """The ids of a single prompt. Raises `ValueError` for several."""
        rows = self._rows(prompt)
        if len(rows) != 1:
            raise ValueError(
                f"{call} takes one prompt, got {len(rows)}; call it once for each, or use generate for texts."
            )
        return rows[0]

    def _rows(self, prompt: Prompt, attention_mask: Any = None) -> list[Tensor]:
        """The ids of each prompt, without what the tokenizer appended to them.

        Raises `ValueError` unless positions count from 0, as those of new tokens continue them.
        """
        batch = self.to_batch(prompt, None, attention_mask)
        for positions in batch.positions:
            real = positions[positions >= 0]
            if not torch.equal(real, torch.arange(len(real), device=real.device)):
                raise ValueError(
                    f"Generation needs positions that count from 0, got {real[:8].tolist()}: omit position_ids."
                )
        rows = batch.rows()
        return to_continue(rows, self.tokenizer) if isinstance(prompt, Mapping) else rows

    def _generate(self, rows: list[Tensor], how: Sampling, on_step: OnStep | None) -> list[Generation]:
        how.check(max(map(len, rows)), self.max_ctx, self.name)
        _ = self.backend.has_cache  # probed before any edit is installed
        crosses = max(map(len, rows)) + how.max_new_tokens > self.backend.rope_border
        together = len({len(row) for row in rows}) == 1 or (self.backend.honours_padding and not crosses)
        rows = [row.to(self.device) for row in rows]

        def check(logits: Tensor, n: int) -> None:
            self._check_finite(logits.amax(-1), f" at new token {n} of {how.max_new_tokens}")

        with self._running(generating=True):
            groups = [rows] if together else [[row] for row in rows]
            step = self._step_from_start if crosses else self._step
            return [
                one
                for group in groups
                for one in sample(partial(step, _n_prompt(group, how.n_samples)), group, how, check, on_step)
            ]

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that end a text: EOS, and those that the model's generation config names."""
        more = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = more if isinstance(more, (list, tuple)) else [more]
        return {token for token in (self.eos_id, *listed) if token is not None}

    def _step(self, n_prompt: Tensor, ids: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last of `ids`; with a KV cache only the new tokens are run."""
        past = 0 if cache is None else cache.get_seq_length()
        with tapped(self.backend.hook_places, self._pass(ids[:, past:], positions[:, past:], n_prompt)):
            return self.backend.step(ids, positions, cache)
        raise AssertionError("no capture can cut a generation step")

    def _step_from_start(self, n_prompt: Tensor, ids: Tensor, positions: Tensor, cache: None) -> tuple[Tensor, None]:
        """As `_step`, but from the first token on, for a model whose keys change beyond `rope_border`."""
        return self._step(n_prompt, ids, positions, cache)[0], None

    def _check_finite(self, highest: Float[Tensor, " n"], when: str) -> None:
        """Raises `ModelError` if any of the `highest` logits is NaN or infinite, so that no token is the most likely."""
        if bool(highest.isfinite().all()):
            return
        dtype = str(self.dtype).removeprefix("torch.")
        edits = ", ".join(repr(edit)[:120] for edit in self.edits)
        active = f"under {len(self.edits)} edits ({edits})" if edits else "with no active edit"
        weaker = "Steer less strongly, or load" if edits else "Load"
        raise ModelError(
            f"{self.name} computed NaN or infinite logits{when}, in {dtype}, {active}. {weaker} the model in a wider dtype "
            "(load_model(..., dtype=torch.float32))."
        )


def _n_prompt(rows: Sequence[Tensor], n_samples: int) -> Tensor:
    """The number of prompt tokens of each sequence of a batch."""
    return torch.tensor([len(row) for row in rows for _ in range(n_samples)])
