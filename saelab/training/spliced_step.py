"""A training step of an SAE that is spliced into its model, whose weights are frozen:

    L = kl_weight * KL(p || p_spliced) + fvu_weight * L_SAE

`p` is what the model predicts behind each token of the mask, `p_spliced` what it predicts when the activations of all these
tokens at the SAE's hook are replaced by their reconstructions (others keep theirs, which is reconstruction plus error), and L_SAE
the SAE's own loss, FVU + auxk_alpha * AuxK for most. With a weight of 0 the KL is not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import TrainingError
from saelab.losses import kl_divergence, log_probs, sum_of_squares, total_variance
from saelab.models.differentiable import differentiable_logits
from saelab.models.language_model import LanguageModel
from saelab.saes import SAE, Batch, Loss, StepInfo
from saelab.training.contexts import ContextRows
from saelab.training.steps import AutogradTraining, Trained


@dataclass
class Splice:
    """An edit that replaces the kept rows of a hook by their reconstructions, as selected in training."""

    hook_name: str
    sae: SAE
    keep: Bool[Tensor, "batch seq"]
    info: StepInfo
    losses: list[Loss] = field(default_factory=list)
    """The SAE's own loss, in each pass."""
    first_token: ClassVar[bool] = True
    """`keep` alone says which rows."""

    def apply(self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]) -> Tensor:
        """`x` with the kept rows replaced."""
        keep = self.keep.to(x.device)
        rows = x[keep]
        loss = self.sae.loss(Batch(rows, rows), self.info)
        self.losses.append(loss)
        return x.masked_scatter(keep[..., None], self.sae.decode(loss.feature_acts, rows).to(x.dtype))


def spliced_loss(
    sae: SAE, lm: LanguageModel, rows: ContextRows, info: StepInfo, edits: Any = ()
) -> tuple[Float[Tensor, ""], Loss]:
    """The KL, and the SAE's own loss; `edits` apply too. Differentiable with respect to the SAE, and to what edits at earlier
    hooks are computed from."""
    assert rows.log_probs is not None
    splice = Splice(rows.hook_name, sae, rows.keep, info)
    logits = differentiable_logits(lm, rows.batch, [*edits, splice])
    return kl_divergence(rows.log_probs, log_probs(logits[rows.scored.to(logits.device)])), splice.losses[-1]


class SplicedTraining(AutogradTraining):
    """The steps of an SAE in its model, in one process."""

    def __init__(self, of: Trained, lm: LanguageModel, kl_weight: float, fvu_weight: float) -> None:
        super().__init__(of)
        if of.mesh.world.size > 1:
            raise ValueError(
                f"An SAE is trained inside its model in a single process; this job has {of.mesh.world.size}: start it without "
                "torchrun."
            )
        self._lm, self._kl_weight, self._fvu_weight = lm, kl_weight, fvu_weight

    def _forward_backward(self, rows: Any, micro_batch: range, info: StepInfo, logged: bool) -> dict[str, float]:
        ctx_len = rows.ids.shape[1]
        part: ContextRows = rows.part(slice(micro_batch.start // ctx_len, micro_batch.stop // ctx_len))
        sae = self._of.sae
        if len(part.x) < 2:
            raise TrainingError(
                f"The mask leaves {len(part.x)} of the {part.ids.numel()} tokens of step {info.step}, whose FVU is undefined: "
                "raise batch_size, lower grad_accumulation, or use longer texts."
            )
        if self._kl_weight:
            kl, loss = spliced_loss(sae, self._lm, part, info)
        else:
            kl, loss = part.x.new_zeros(()), sae.loss(Batch(part.x, part.x), info)
        total, share = self._kl_weight * kl + self._fvu_weight * loss.total, len(part.x) / len(rows.x)
        (total * share).backward()
        self._of.dead.update(loss.feature_acts)
        values = {"loss": total.item(), "l0": loss.feature_acts.nnz / len(part.x)}
        if logged:
            values |= {"kl": kl.item()} if self._kl_weight else {}
            values |= {name: term.item() for name, term in loss.terms.items()}
            values["fvu"] = float(sum_of_squares(loss.residual) / total_variance(loss.y))
        return {name: share * value for name, value in values.items()}
