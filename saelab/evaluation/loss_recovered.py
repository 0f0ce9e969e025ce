"""What it costs the model to run through an SAE: cross-entropy and KL with the kept rows of one hook replaced.

The same rows are replaced in every arm: by the reconstruction, by zero, or by the mean row. Losses are measured at those
rows, for the next token of the same context, in nats. A transcoder's prediction, computed from its unedited input hook,
replaces the rows of its output hook. A crosscoder's hooks are replaced one at a time, by its reconstruction from all of
them, unedited, and the results are means over its hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.models import LanguageModel
from saelab.models.multi_model import locate
from saelab.saes import SAE
from saelab.saes.hooks_used import HooksUsed

ARMS = ("sae", "zero", "mean")
MAX_LOGITS = 1 << 25
"""Logits of one forward pass at most, unless one context has more: 128 MiB in float32, of which several copies are needed."""


@dataclass
class ReplaceRows:
    """An edit that replaces the kept rows of a hook."""

    hook_name: str
    keep: Bool[Tensor, "batch seq"]
    replacement: SAE | Float[Tensor, " d_in"] | Float[Tensor, "n_kept d_in"]
    first_token: ClassVar[bool] = True
    """`keep` alone says which rows."""

    def apply(self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]) -> Tensor:
        """`x` with the kept rows replaced by the reconstruction, by rows, or by one row."""
        rows, by = x[self.keep], self.replacement
        new = by(rows).x_hat if isinstance(by, SAE) else by.expand_as(rows)
        out = x.clone()
        out[self.keep] = new.to(x)
        return out


class LossRecovered:
    """Sums of the four arms over the scored positions; `mean` has a source axis if there are several sources."""

    def __init__(self, sae: SAE, lm: LanguageModel, hooks: HooksUsed, mean: Float[Tensor, "*sources d_out"]) -> None:
        self.sae, self.lm, self.hooks = sae, lm, hooks
        self.means = mean.reshape(len(hooks.outputs), -1)
        self.n, self.kl = 0, 0.0
        self.loss: dict[str, float] = {arm: 0.0 for arm in ("model", *ARMS)}

    def add(
        self, ids: Int[Tensor, "batch seq"], keep: Bool[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
    ) -> None:
        """Score one batch; `real` is True where a token is not padding."""
        d_vocab = locate(self.lm, self.hooks.outputs[-1])[0].d_vocab
        n_contexts = max(1, MAX_LOGITS // (ids.shape[1] * d_vocab))
        for one in zip(*(tensor.split(n_contexts) for tensor in (ids, keep, real)), strict=True):
            self._add(*one)

    def _add(self, ids: Int[Tensor, "n seq"], keep: Bool[Tensor, "n seq"], real: Bool[Tensor, "n seq"]) -> None:
        scored = keep[:, :-1] & real[:, 1:]  # replaced here, and a token follows
        if not bool(scored.any()):
            return
        self.n += int(scored.sum())
        rebuilt = self._rebuilt(ids, keep)
        for hook, by, mean in zip(self.hooks.outputs, rebuilt, self.means, strict=True):
            lm, hook_name = locate(self.lm, hook)
            targets = ids[:, 1:][scored].to(lm.device)
            original = self._log_probs(lm.logits(ids), scored)
            self.loss["model"] += _nll(original, targets)
            for arm, replacement in {"sae": by, "zero": torch.zeros_like(mean), "mean": mean}.items():
                edit = ReplaceRows(hook_name, keep.to(lm.device), replacement)
                log_probs = self._log_probs(lm.run_with_edit(ids, edit), scored)
                self.loss[arm] += _nll(log_probs, targets)
                if arm == "sae":
                    self.kl += float((original.exp() * (original - log_probs)).sum())

    def _rebuilt(self, ids: Int[Tensor, "batch seq"], keep: Bool[Tensor, "batch seq"]) -> list[Any]:
        """Replacement rows of each output hook; for an SAE with a single hook the SAE itself, which is applied in place."""
        if len(self.hooks.all) == 1:
            return [self.sae]
        found = next(iter(self.lm.stream_activations([ids], list(self.hooks.all))))
        x = self.hooks.batch({name: activations[keep.to(activations.device)] for name, activations in found.items()}).x
        x_hat = self.sae(x.float()).x_hat
        return list(x_hat.reshape(len(x), len(self.hooks.outputs), -1).unbind(1))

    @staticmethod
    def _log_probs(logits: Tensor, scored: Tensor) -> Float[Tensor, "n vocab"]:
        return logits[:, :-1][scored.to(logits.device)].float().log_softmax(-1)

    def results(self) -> dict[str, float | None]:
        """Keys of `report.json`; recovered fractions are None if ablation changes the loss by less than 1e-3 nats."""
        if self.n == 0:
            return dict.fromkeys(("ce_loss", "ce_loss_sae", "ce_loss_recovered", "ce_loss_recovered_mean", "kl"))
        n = self.n * len(self.hooks.outputs)
        loss = {arm: total / n for arm, total in self.loss.items()}
        recovered: dict[str, float | None] = {}
        for arm, key in (("zero", "ce_loss_recovered"), ("mean", "ce_loss_recovered_mean")):
            gap = loss[arm] - loss["model"]
            recovered[key] = (loss[arm] - loss["sae"]) / gap if abs(gap) >= 1e-3 else None
        return {"ce_loss": loss["model"], "ce_loss_sae": loss["sae"], **recovered, "kl": self.kl / n}


def _nll(log_probs: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> float:
    return -float(log_probs.gather(1, targets[:, None]).double().sum())
