"""Running held-out text through a model to score an SAE, with the packing, mask and split rule of its training.

Evaluation and the feature store both use this, so their token counts and masks agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.activation_cache.checks import refuse_steered
from saelab.errors import ModelError
from saelab.models import LanguageModel
from saelab.models.multi_model import ModelsTogether, names_and_hashes
from saelab.saes import SAE, Batch
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.trained_hooks import check_is_sae, hooks_of
from saelab.tokens import Texts, TokenBatch, document_id, load_texts
from saelab.tokens.mask import MASK_RULE, Mask, NormRule, row_norms
from saelab.tokens.packing import PACKED, contexts
from saelab.tokens.tokenizing import context_start, resolved_bos
from saelab.validation import check_integer


class ScoreBatch(NamedTuple):
    """One forward pass of the model."""

    tokens: TokenBatch
    activations: Float[Tensor, "batch ctx_len *sources d_in"]
    """What the SAE reads."""
    keep: Bool[Tensor, "batch ctx_len"]
    """Tokens that the mask keeps."""


@dataclass
class ScoreStream:
    """Iterate to get `ScoreBatch`es, or `pairs()`; afterwards `n_tokens` and `n_masked` hold the counts."""

    lm: LanguageModel
    hooks: HooksUsed
    split: str
    texts: Texts
    batches: list[TokenBatch]
    mask: Mask
    prepend_bos: bool | list[int]
    document_ids: list[int]
    """`document_id` of every document, in the order in which `TokenBatch.doc` counts them."""
    n_tokens: int = 0
    n_masked: dict[str, int] = field(default_factory=lambda: {"special": 0, "position": 0, "norm": 0})
    mask_rule: dict[str, Any] = field(default_factory=lambda: dict(MASK_RULE))

    @property
    def hook_name(self) -> str:
        """The hook that the SAE writes to, the last if there are several: where features are steered, and their logits read."""
        return self.hooks.outputs[-1]

    @property
    def start(self) -> list[int]:
        """Ids that every context begins with."""
        return context_start(self.lm, self.prepend_bos)

    @property
    def max_norm(self) -> float | dict[str, float] | None:
        """The mask's norm limit; with several hooks, a dict by hook name."""
        max_norms = self.mask.max_norm or {}
        return (
            max_norms.get(self.hook_name) if len(self.hooks.all) == 1 else {name: max_norms[name] for name in max_norms}
        )

    def __iter__(self) -> Iterator[ScoreBatch]:
        return (ScoreBatch(tokens, batch.x, keep) for tokens, batch, keep in self.pairs())

    def pairs(self) -> Iterator[tuple[TokenBatch, Batch, Bool[Tensor, "batch ctx_len"]]]:
        """Tokens, `Batch(x, y)` of the SAE's inputs and targets, and the tokens that the mask keeps."""
        hooks = list(self.hooks.all)
        stream = self.lm.stream_activations((batch.ids for batch in self.batches), hooks)
        for tokens, found in zip(self.batches, stream, strict=True):
            keep, counts = self.mask.apply(tokens, found)
            for hook in hooks:
                self._refuse_infinite(hook, found[hook][keep.to(found[hook].device)], tokens)
            self.n_tokens += int(keep.sum())
            for reason, count in counts.items():
                self.n_masked[reason] += count
            yield tokens, self.hooks.batch(found), keep

    def _refuse_infinite(self, hook: str, kept: Tensor, tokens: TokenBatch) -> None:
        if not bool(kept.isfinite().all()):
            raise ModelError(
                f"{self.lm.name} computed NaN or infinite activations at {hook} in the batch of "
                f"{len(tokens.ids)} contexts from context {tokens.first_context}; try dtype=torch.float32."
            )


def open_score_stream(
    sae: SAE,
    lm: LanguageModel,
    texts: Any = None,
    *,
    split: str | None = None,
    allow_train: bool = False,
    hook_name: str | Sequence[str] | None = None,
    n_tokens: int | None = None,
    ctx_len: int | None = None,
    batch_size: int = 16,
) -> ScoreStream:
    """Tokenise the texts to score and check them against the SAE's training documents, before any forward pass.

    `texts=None` is the source the SAE was trained on. `split=None` is the held-out tenth of that source, and all of any
    other. Raises `ValueError` if the SAE does not fit the hook, if the model is being steered, if nothing is left to
    score, or, naming the count, if a document is among those the SAE was trained on (unless `allow_train`).
    """
    check_scoring(sae, lm, n_tokens=n_tokens, ctx_len=ctx_len, batch_size=batch_size)
    origin = sae.provenance.origin
    source = load_texts(texts) if texts is not None else own_texts(origin, lm)
    same_texts = source.spec is not None and source.spec == origin.get("texts")
    split = split or ("held_out" if same_texts else "all")
    hooks = hooks_of(sae, hook_name)
    _check_fit(sae, lm, hooks)
    ids: list[int] = []
    width = int(ctx_len or origin.get("ctx_len") or min(256, lm.max_ctx))
    bos, note = bos_of(origin, lm), lambda _, document: ids.append(document_id(document))
    packing, documents = origin.get("packing", PACKED), source.documents(split, lm)
    batches = list(contexts(documents, lm, width, batch_size, bos, packing, n_tokens, on_document=note))
    if not batches:
        raise ValueError(f"There is no text to score: split={split!r} of {source.name} holds no token.")
    if not allow_train:
        _refuse_training_documents(sae, ids, source, split)
    max_norm = (origin.get("mask") or {}).get("max_norm")
    stream = ScoreStream(lm, hooks, split, source, batches, Mask(lm.special_ids, None), bos, ids)
    known: dict[str, Any] = max_norm if isinstance(max_norm, dict) else dict.fromkeys(hooks.all[:1], max_norm)
    max_norms = {name: float(known[name]) for name in hooks.all if known.get(name)}
    stream.mask = Mask(lm.special_ids, max_norms if len(max_norms) == len(hooks.all) else _max_norms(stream))
    return stream


def bos_of(origin: Mapping[str, Any], lm: LanguageModel) -> bool | list[int]:
    """Whether contexts begin with BOS: as in the SAE's training or, if that is not recorded, as the tokenizer does."""
    return resolved_bos(lm, origin.get("prepend_bos"))


def _check_fit(sae: SAE, lm: LanguageModel, hooks: HooksUsed) -> None:
    """Raise `ValueError` if the SAE does not fit its hooks; warn if it was trained on another model or tokenizer."""
    origin = sae.provenance.origin
    models = origin.get("models")
    if models and not isinstance(lm, ModelsTogether):
        raise ValueError(
            f"The SAE reads {len(models)} models ({', '.join(models)}): give a list of them, in this order."
        )
    for name in hooks.all:
        lm.check_hook(name)
    d_out = sae.shape.get("d_out", sae.d_in)
    for names, width, verb in ((hooks.inputs, sae.d_in, "reads d_in"), (hooks.outputs, d_out, "writes d_out")):
        for name in names:
            if lm.d_in(name) != width:
                raise ValueError(f"{name} of {lm.name} has width {lm.d_in(name)}, but the SAE {verb}={width}.")
    trained_on = list((models or {"": origin.get("model")}).values())
    here = list(names_and_hashes(lm).values()) or [{"name": lm.name, "hash": lm.hash}]
    for then, now in zip(trained_on, here, strict=False):
        if then and then.get("hash", now["hash"]) != now["hash"]:
            warnings.warn(
                f"The SAE was trained on {then['name']}, but this is {now['name']}: its weights differ.", stacklevel=4
            )
    if (tokens := origin.get("tokenizer_hash")) and tokens != lm.tokenizer_hash:
        warnings.warn(
            f"The SAE was trained with the tokenizer {tokens[:12]}, but {lm.name} has {lm.tokenizer_hash[:12]}: with "
            "other tokens, results mean little. Load the model with the original tokenizer.",
            stacklevel=4,
        )


def check_scoring(sae: SAE, lm: LanguageModel, **sizes: Any) -> None:
    """Raise `ValueError` for what is not an SAE, a steered model, and sizes that are not positive integers (or None, or 0 for
    `n_tokens_ce`, which measures no loss)."""
    check_is_sae(sae, "scoring")
    refuse_steered(lm)
    for name, value in sizes.items():
        if value is not None:
            check_integer(name, value, 0 if name == "n_tokens_ce" else 1)


def own_texts(origin: Mapping[str, Any], lm: LanguageModel) -> Texts:
    """The texts that an SAE of this origin was trained on; conversations are rendered with the chat template of `lm`.

    Raises `ValueError` if they cannot be reopened.
    """
    spec = origin.get("texts")
    if spec is None or spec.get("source") == "strings":
        raise ValueError("The original texts were strings in memory, which cannot be reopened: give texts (--texts).")
    return Texts.from_spec(spec, lm)


def _refuse_training_documents(sae: SAE, document_ids: list[int], texts: Texts, split: str) -> None:
    seen = torch.isin(torch.tensor(document_ids, dtype=torch.int64), sae.provenance.train_documents)
    if bool(seen.any()):
        raise ValueError(
            f"{int(seen.sum())} of {len(seen)} documents of {texts.name} (split={split!r}) were used to train this SAE: its "
            'scores on them would be too good. Score split="held_out" or other texts, or pass allow_train=True.'
        )


def _max_norms(stream: ScoreStream) -> dict[str, float]:
    """The norm rule applied to the first rows of the stream itself, for an SAE that records no norm limits."""
    mask_rule = NormRule(stream.lm.special_ids)
    ids = (batch.ids for batch in stream.batches)
    for tokens, found in zip(stream.batches, stream.lm.stream_activations(ids, list(stream.hooks.all)), strict=False):
        mask_rule.add(tokens, row_norms(found))
        if mask_rule.ready:
            break
    if not mask_rule.n_rows:
        raise ValueError(
            f"There is no token to score in {stream.texts.name}: all are masked (first of context, special)."
        )
    return mask_rule.max_norms()
