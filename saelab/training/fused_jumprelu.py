"""The fused step of a JumpReLU SAE: thresholds with their pseudo-gradient, and each of its penalties (`saes/jumprelu.py`).

The list also holds the pairs below their threshold that its gradient reaches. Dead features are revived as in `FusedStep`: while
there are some, or may soon be, the host asks for their number before each step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.step.penalty import STEPS, TANH, Penalty
from saelab.kernels.triton_backend.step.strength import Square
from saelab.kernels.triton_backend.step.update import RECORD, Moments, update_vector
from saelab.losses import auxk
from saelab.saes.jumprelu import AUXK_ALPHA, JumpReLUSAE
from saelab.training.fused_threshold import FusedThreshold
from saelab.training.late_records import Record

_TERM = RECORD.index("auxk")


class FusedJumpReLU(FusedThreshold):
    """Steps the thresholds too."""

    term = "sparsity"

    @property
    def jump(self) -> JumpReLUSAE:
        """The SAE."""
        return cast("JumpReLUSAE", self.sae)

    @property
    def helps_dead(self) -> bool:
        config = self.jump.config
        return config.revival == "auxk" or (config.revival == "pre_act" and config.pre_act_coefficient > 0)

    @property
    def norms_unread(self) -> bool:
        return self.jump.config.loss != "tanh"

    @property
    def penalty(self) -> Penalty:
        config = self.jump.config
        kind = STEPS if self.norms_unread else TANH
        return Penalty(kind, config.tanh_scale, config.bandwidth * self.jump.unit, config.ste_to_input)

    @property
    def square(self) -> Square:
        config = self.jump.config
        return Square(float(self.sae.d_in), config.target_l0 or 0.0) if config.loss == "l0_target" else Square(0.0, 0.0)

    def thresholds(self) -> tuple[Tensor, Tensor]:
        theta = self.jump.threshold.detach()
        return theta, theta - self.penalty.bandwidth / 2

    def norms(self) -> Float[Tensor, " d_sae"] | None:
        return None if self.norms_unread else super().norms()

    def _step_weights(self, *args: Any) -> None:
        super()._step_weights(*args)
        log_threshold = self.jump.log_threshold
        moments = Moments(log_threshold, *self.adam.moments(log_threshold))
        update_vector(moments, self._sums.dtheta, self._control, self.schedule, self._options)

    def _add_revival(self, dead: Int[Tensor, " n_dead"], residual: Tensor, variance: Tensor) -> None:
        sae, config, x, n = self.jump, self.jump.config, self.rows.x, self.n_rows
        read = sae.W_enc, sae.W_dec, sae.b_enc, sae.log_threshold
        with torch.enable_grad():
            W_enc, W_dec, b_enc, log_threshold = rows = [p.detach()[dead].requires_grad_() for p in read]
            if config.revival == "auxk":
                term = auxk(x, -residual, W_enc, b_enc, W_dec, max(sae.d_in // 2, 1))
                weighted = AUXK_ALPHA / n * variance * term
            else:
                shortfall = (log_threshold.exp() - torch.addmm(b_enc, x, W_enc.T)).relu() * W_dec.norm(dim=1)
                term = shortfall.sum() / n
                weighted = config.pre_act_coefficient * term
            gradients = torch.autograd.grad(weighted, rows, allow_unused=True, materialize_grads=True)
        for total, more in zip((*self._gradients, self._sums.dtheta), gradients, strict=True):
            total.index_add_(0, dead, more)  # each row once: no sum depends on an order
        self.record[_TERM], self.record[-1] = term.detach(), weighted.detach()

    def values(self, record: Record) -> dict[str, Any]:
        found = super().values(record)
        if record.with_aux:
            numbers = record.numbers.tolist()
            found |= {self.jump.config.revival: numbers[_TERM], "loss": found["loss"] + numbers[-1]}
        return found
