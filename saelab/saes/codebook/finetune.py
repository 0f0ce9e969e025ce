"""Training a model together with the codebooks inserted in it: next-token cross-entropy plus the codebooks' losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from saelab.errors import TrainingError
from saelab.models.families import in_eval_mode
from saelab.saes.codebook.insertion import Inserted, reached
from saelab.saes.codebook.revival import generator_of
from saelab.tokens import load_texts, pack
from saelab.validation import check_integer

if TYPE_CHECKING:
    from saelab.models.language_model import LanguageModel

CLIP_NORM = 1.0


def finetune(
    lm: LanguageModel,
    texts: Any,
    inserted: Inserted | None = None,
    *,
    n_steps: int = 1000,
    batch_size: int = 24,
    ctx_len: int = 128,
    lr: float = 5e-4,
    warmup_steps: int = 20,
    train_lm: bool = True,
    split: str = "train",
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train the codebooks of `inserted`, and with `train_lm` the model's weights, in place; returns the LM loss of each step.

    `texts` is anything `load_texts` takes, read in order and repeated as needed, or token ids `(n, seq)`, from which every
    step samples a batch. `inserted=None` trains the model alone. The model stays in eval mode (no dropout). The learning
    rate rises over `warmup_steps`, then is constant. Raises `ValueError` for bad arguments, `TrainingError` if the loss is
    not finite.
    """
    for name, value in (("n_steps", n_steps), ("batch_size", batch_size), ("warmup_steps", warmup_steps)):
        check_integer(name, value, 0 if name == "warmup_steps" else 1)
    books = [] if inserted is None else list(inserted.bottlenecks.values())
    if inserted is not None and (inserted.lm is not lm or not inserted.active):
        raise ValueError(f"{inserted!r} are not in this model, or were removed: insert codebooks in {lm.name} first.")
    if train_lm and lm.dtype != torch.float32:
        raise ValueError(f"{lm.name} is {lm.dtype}; train it in float32 (load_model(..., dtype=torch.float32)).")
    from_ids = isinstance(texts, Tensor)
    batches = _from_ids(texts, batch_size, seed) if from_ids else _from_texts(lm, texts, batch_size, ctx_len, split)
    bar = tqdm(range(n_steps), desc="Finetuning", unit="step", disable=not progress)
    losses: list[float] = []
    with _trained(lm, inserted, train_lm) as parameters, bar:
        optimizer = torch.optim.Adam(parameters, lr)
        for step in bar:
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(warmup_steps, 1))
            losses.append(_step(lm, books, *next(batches), optimizer, parameters))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return losses


def _step(lm: LanguageModel, books: list[Any], ids: Tensor, labels: Tensor, optimizer: Any, parameters: Any) -> float:
    ids, labels = ids.to(lm.device), labels.to(lm.device)
    for book in books:
        book.forget()
    loss = lm_loss(_logits(lm, ids), labels)
    total = loss + sum(reached(book, book.loss) for book in books)
    optimizer.zero_grad()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    if not bool(norm.isfinite() & total.isfinite()):
        raise TrainingError(f"The loss is {total.item()}, its gradient's norm {norm.item()}: lower lr.")
    optimizer.step()
    for book in books:
        book.codebook.after_step()
    return loss.item()


def lm_loss(logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy; labels of -100 are ignored."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _logits(lm: LanguageModel, ids: Tensor) -> Tensor:
    return lm.backend.forward(ids, None, with_cache=False)[0]


@contextmanager
def _trained(lm: LanguageModel, inserted: Inserted | None, train_lm: bool) -> Iterator[list[nn.Parameter]]:
    """Yields the parameters to train; on exit their `requires_grad` is restored and the codebooks return to eval mode."""
    codebooks = [] if inserted is None else list(inserted.codebooks.values())
    parameters = [p for book in codebooks for p in book.parameters()] + (
        list(lm.model.parameters()) if train_lm else []
    )
    if not parameters:
        raise ValueError("There is nothing to train: insert codebooks, or set train_lm=True.")
    if inserted is not None and train_lm and inserted.base_hash is None:
        inserted.base_hash = lm.hash
    for book in codebooks:
        book.train()
    required = [(parameter, parameter.requires_grad) for parameter in lm.model.parameters()]
    lm.model.requires_grad_(train_lm)
    try:
        with in_eval_mode(lm.model):
            yield parameters
    finally:
        for parameter, before in required:
            parameter.requires_grad_(before)
        for book in codebooks:
            book.eval()
        for parameter in parameters:
            parameter.grad = None
        if train_lm:
            lm.weights_changed()


def _from_ids(ids: Int[Tensor, "n seq"], batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    step = 0
    while True:
        rows = torch.randint(len(ids), (batch_size,), generator=generator_of(seed, step))
        yield ids[rows], ids[rows]
        step += 1


def _from_texts(
    lm: LanguageModel, texts: Any, batch_size: int, ctx_len: int, split: str
) -> Iterator[tuple[Tensor, Tensor]]:
    source = load_texts(texts)
    if next(source.documents(split), None) is None:
        raise ValueError(f"{source.name} has no documents in split {split!r}: pass more texts, or another split.")
    while True:
        for batch in pack(source.documents(split), lm, ctx_len, batch_size):
            yield batch.ids, batch.ids.masked_fill(batch.doc < 0, -100)
