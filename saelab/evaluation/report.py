"""`saelab.evaluate`: one report on an SAE, measured on held-out documents under the mask of its training."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.evaluation.heldout import ScoreStream, check_scoring, open_score_stream, own_texts
from saelab.evaluation.loss_recovered import LossRecovered
from saelab.evaluation.reconstruction import Reconstruction, VarianceSums
from saelab.files import atomic_write_text, read_json
from saelab.identity import differences, of_scoring, scoring_absent
from saelab.models import LanguageModel
from saelab.models.multi_model import together
from saelab.saes import SAE, SAEOutput
from saelab.saes.trained_hooks import refuse_partial
from saelab.tokens import Texts, load_texts
from saelab.tokens.mask import token_mask

_CE_BATCH = 4
_DEFINITIONS = 2  # increment when the definition of a metric changes: earlier reports are then recomputed


@dataclass(frozen=True)
class Report:
    """Definitions: docs/report.md. Fractions are 0 to 1, losses and KL in nats per token; None means "not defined here"."""

    fvu: float | None
    fvu_unmasked: float | None
    fvu_special: float | None
    explained_variance: float | None
    l0: float
    dead_fraction: float
    dense_fraction: float
    cosine: float
    relative_reconstruction_bias: float | None
    ce_loss: float | None
    ce_loss_sae: float | None
    ce_loss_recovered: float | None
    ce_loss_recovered_mean: float | None
    kl: float | None
    n_tokens: int
    n_tokens_ce: int
    n_masked: dict[str, int]
    mask: dict[str, Any]
    split: str
    texts: str
    hook_name: str
    sae_hash: str
    model_hash: str
    request: dict[str, Any]
    """What was requested: the same request returns the saved report."""
    fvu_by_hook: dict[str, float | None] | None = None
    """`fvu` of each hook by itself, where several are reconstructed."""

    def to_json(self) -> str:
        """The content of `report.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write `report.json` atomically; returns its path."""
        atomic_write_text(path, self.to_json() + "\n")
        return Path(path)

    def rows(self) -> list[tuple[str, str]]:
        """Name and printable value of each metric."""
        hidden = ["mask", "sae_hash", "model_hash", "request", *(["fvu_by_hook"] if self.fvu_by_hook is None else [])]
        return [(key, _show(value)) for key, value in dataclasses.asdict(self).items() if key not in hidden]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("measure", "value", title=f"SAE {self.sae_hash[:8]} on {self.hook_name}")
        for name, value in self.rows():
            table.add_row(name, value)
        return table

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table><caption>SAE {self.sae_hash[:8]} on {html.escape(self.hook_name)}</caption>{cells}</table>"


def evaluate(
    sae: SAE,
    lm: LanguageModel | Sequence[LanguageModel],
    texts: Any = None,
    *,
    split: str | None = None,
    allow_train: bool = False,
    hook_name: str | Sequence[str] | None = None,
    n_tokens: int | None = None,
    n_tokens_ce: int = 4_096,
    ctx_len: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
    path: str | Path | None = None,
) -> Report:
    """Evaluate an SAE. `texts=None` scores the held-out tenth of the SAE's own source; any other texts are scored in full.

    Reconstruction is measured on every token (or the first `n_tokens`), the language model's loss on the first
    `n_tokens_ce`, which takes four full forward passes. A report at `path` for the same weights, texts, tokenizer and
    arguments is returned as is. Raises `ValueError` if the SAE was trained on a scored document (`allow_train=True` overrides)
    or does not fit. `lm` is a list for a crosscoder of several models; `hook_name` may list all hooks that the SAE uses.
    """
    check_scoring(sae, lm := together(lm), n_tokens=n_tokens, n_tokens_ce=n_tokens_ce)
    refuse_partial(sae, "scored")
    source = own_texts(sae.provenance.origin, lm) if texts is None else load_texts(texts)
    request = {"split": split, "hook_name": _listed(hook_name), "n_tokens": n_tokens, "n_tokens_ce": n_tokens_ce}
    request |= {"ctx_len": ctx_len, "batch_size": batch_size, "allow_train": allow_train, **_meaning(sae, lm, source)}
    if path is not None and (saved := _saved_report(Path(path), request, sae)) is not None:
        return saved
    stream = open_score_stream(
        sae, lm, source, split=split, allow_train=allow_train, hook_name=hook_name,
        n_tokens=n_tokens, ctx_len=ctx_len, batch_size=batch_size,
    )  # fmt: skip
    with torch.inference_mode():
        measures, masked, keeps = _measure(sae, stream, progress)
        losses = _score_losses(sae, stream, keeps, measures, n_tokens_ce, progress)
    report = _report(sae, stream, measures, masked, losses, request)
    if path is not None:
        report.save(path)
    return report


def _meaning(sae: SAE, lm: LanguageModel, texts: Texts) -> dict[str, Any]:
    """What determines the results, apart from the caller's arguments."""
    return of_scoring(sae, lm, texts) | {"definitions": _DEFINITIONS}


def _listed(hook_name: str | Sequence[str] | None) -> str | list[str] | None:
    """`hook_name` as it reads back from JSON."""
    return hook_name if hook_name is None or isinstance(hook_name, str) else list(hook_name)


def _saved_report(path: Path, request: dict[str, Any], sae: SAE) -> Report | None:
    """The report at `path` if it answers `request`; None if it does not, is unreadable, or has other fields."""
    try:
        saved = read_json(path)
        absent = scoring_absent(sae.provenance.origin.get("tokenizer_hash"))
        return None if differences(saved["request"], request, absent) else Report(**saved)
    except (SaelabError, KeyError, TypeError, AttributeError):
        return None


def _report(
    sae: SAE,
    stream: ScoreStream,
    measures: Reconstruction,
    masked: dict[str, VarianceSums],
    losses: LossRecovered,
    request: dict[str, Any],
) -> Report:
    return Report(
        **measures.results(),  # pyright: ignore[reportArgumentType]
        **losses.results(),
        **{name: sums.fvu for name, sums in masked.items()},  # pyright: ignore[reportArgumentType]
        n_tokens=measures.variance.n,
        n_tokens_ce=losses.n,
        n_masked=stream.n_masked,
        mask={"max_norm": stream.max_norm, "rule": stream.mask_rule},
        split=stream.split,
        texts=stream.texts.name,
        hook_name=str(stream.hooks),
        sae_hash=sae.hash,
        model_hash=stream.lm.hash,
        request=request,
        fvu_by_hook=dict(zip(stream.hooks.outputs, measures.fvu_by_source, strict=True))
        if measures.fvu_by_source
        else None,
    )


def _measure(
    sae: SAE, stream: ScoreStream, progress: bool
) -> tuple[Reconstruction, dict[str, VarianceSums], list[Bool[Tensor, "batch ctx_len"]]]:
    """One pass over all tokens: the metrics under the mask, the sums with masked tokens, and what the mask keeps."""
    measures, keeps = Reconstruction(sae), []
    masked = {"fvu_unmasked": VarianceSums(), "fvu_special": VarianceSums()}
    device = sae.W_enc.device
    for tokens, batch, keep in tqdm(stream.pairs(), total=len(stream.batches), desc="Evaluating", disable=not progress):
        real = tokens.doc >= 0
        special = token_mask(tokens.ids, tokens.doc, stream.mask.special_ids)["special"]
        x, y, kept, special = (each[real.to(each.device)].to(device) for each in (batch.x, batch.y, keep, special))
        y, output = y.float(), sae(x.float())
        masked["fvu_unmasked"].add(y, output.x_hat)
        masked["fvu_special"].add(y[special], output.x_hat[special])
        if bool(kept.any()):
            measures.add(y[kept], SAEOutput(output.x_hat[kept], output.acts.select_rows(kept)))
        keeps.append(keep)
    if measures.variance.n == 0:
        raise ValueError(f"No token of {stream.texts.name} is left under the mask: {stream.n_masked}. Give more text.")
    return measures, masked, keeps


def _score_losses(
    sae: SAE, stream: ScoreStream, keeps: list[Tensor], measures: Reconstruction, budget: int, progress: bool
) -> LossRecovered:
    losses = LossRecovered(sae, stream.lm, stream.hooks, measures.variance.mean.float())
    total = min(budget, stream.n_tokens)
    with tqdm(total=total, desc="Loss recovered", unit="token", disable=not progress) as bar:
        for tokens, keep in zip(stream.batches, keeps, strict=True):
            parts = (part.split(_CE_BATCH) for part in (tokens.ids, keep, tokens.doc >= 0))
            for ids, kept, real in zip(*parts, strict=True):
                if losses.n >= budget:
                    return losses
                losses.add(ids, kept, real)
                bar.update(min(losses.n, total) - bar.n)  # the last contexts are scored in full, beyond the budget
    return losses


def _show(value: Any) -> str:
    if value is None:
        return "not defined"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(number)}" for key, number in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
