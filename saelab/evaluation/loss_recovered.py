"""What the model loses when an SAE stands in its way: cross-entropy and KL with the kept rows of one hook replaced.

The same rows are replaced in every arm: by the reconstruction, by zero, by the mean row. Losses are taken at those rows,
for the next token of the same context, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.models import LanguageModel
from saelab.saes import SAE

ARMS = ("sae", "zero", "mean")


@dataclass
class ReplaceRows:
    """An edit that puts something else in the kept rows of a hook."""

    hook_name: str
    keep: Bool[Tensor, "batch seq"]
    replacement: SAE | Float[Tensor, " d_in"]

    def apply(self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]) -> Tensor:
        """`x` with the kept rows replaced by the reconstruction, or by one row."""
        rows = x[self.keep]
        new = self.replacement(rows).x_hat if isinstance(self.replacement, SAE) else self.replacement.expand_as(rows)
        out = x.clone()
        out[self.keep] = new.to(x)
        return out


class LossRecovered:
    """Sums of the four arms over the scored positions."""

    def __init__(self, sae: SAE, lm: LanguageModel, hook_name: str, mean: Float[Tensor, " d_in"]) -> None:
        self.lm, self.hook_name = lm, hook_name
        self.replacements: dict[str, Any] = {"sae": sae, "zero": torch.zeros(sae.d_in), "mean": mean}
        self.n, self.kl = 0, 0.0
        self.loss: dict[str, float] = {arm: 0.0 for arm in ("model", *ARMS)}

    def add(
        self, ids: Int[Tensor, "batch seq"], keep: Bool[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
    ) -> None:
        """Score one batch; `real` marks what is not padding."""
        scored = keep[:, :-1] & real[:, 1:]  # replaced here, and a token follows
        if not bool(scored.any()):
            return
        targets = ids[:, 1:][scored].to(self.lm.device)
        original = self._log_probs(self.lm.logits(ids), scored)
        self.n += len(targets)
        self.loss["model"] += _nll(original, targets)
        for arm, replacement in self.replacements.items():
            edit = ReplaceRows(self.hook_name, keep.to(self.lm.device), replacement)
            log_probs = self._log_probs(self.lm.run_with_edit(ids, edit), scored)
            self.loss[arm] += _nll(log_probs, targets)
            if arm == "sae":
                self.kl += float((original.exp() * (original - log_probs)).sum())

    @staticmethod
    def _log_probs(logits: Tensor, scored: Tensor) -> Float[Tensor, "n vocab"]:
        return logits[:, :-1][scored.to(logits.device)].float().log_softmax(-1)

    def results(self) -> dict[str, float | None]:
        """Keys of `report.json`; recovered shares are None where ablation changes the loss by less than 1e-3 nats."""
        if self.n == 0:
            return dict.fromkeys(("ce_loss", "ce_loss_sae", "ce_loss_recovered", "ce_loss_recovered_mean", "kl"))
        loss = {arm: total / self.n for arm, total in self.loss.items()}
        recovered: dict[str, float | None] = {}
        for arm, key in (("zero", "ce_loss_recovered"), ("mean", "ce_loss_recovered_mean")):
            gap = loss[arm] - loss["model"]
            recovered[key] = (loss[arm] - loss["sae"]) / gap if abs(gap) >= 1e-3 else None
        return {"ce_loss": loss["model"], "ce_loss_sae": loss["sae"], **recovered, "kl": self.kl / self.n}


def _nll(log_probs: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> float:
    return -float(log_probs.gather(1, targets[:, None]).double().sum())
