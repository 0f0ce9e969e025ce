"""The fused step of a JumpReLU SAE: thresholds with their pseudo-gradient, and each of its penalties (`saes/jumprelu.py`).

The list also holds the pairs below their threshold that its gradient reaches. Dead features are revived by AuxK, or by the
shortfall of their pre-activations (`kernels/.../step/pre_act.py`).
"""

from __future__ import annotations

from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_backend.step.auxk import Weights, add_auxk, empty_aux
from saelab.kernels.triton_backend.step.penalty import STEPS, TANH, Penalty
from saelab.kernels.triton_backend.step.pre_act import add_pre_act, empty_pre_act
from saelab.kernels.triton_backend.step.strength import Square
from saelab.kernels.triton_backend.step.update import RECORD, Moments, update_vector
from saelab.saes.jumprelu import AUXK_ALPHA, JumpReLUSAE
from saelab.training.fused_threshold import FusedThreshold
from saelab.training.late_records import Record


class FusedJumpReLU(FusedThreshold):
    """Steps the thresholds too."""

    term = "sparsity"
    with_theta = True

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

    def _empty_aux(self, capacity: int) -> Any:
        x, n = self.rows.x, self.n_rows
        if self.jump.config.revival == "auxk":
            return empty_aux(capacity, max(self.sae.d_in // 2, 1), AUXK_ALPHA / n, x)
        return empty_pre_act(capacity, self.jump.config.pre_act_coefficient / n, x)

    def _add_aux(self, residual: Tensor, error: Tensor, variance: Tensor) -> Tensor:
        sae, x = self.jump, self.rows.x
        weights, dead = Weights(sae.W_enc, sae.b_enc, sae.W_dec), (self.dead.tokens_since_fired, self.dead.window)
        if sae.config.revival == "auxk":
            add_auxk(x, residual, error, weights, dead, self._aux, self._gradients, variance)
        else:
            theta, dtheta = self.thresholds()[0], self._sums.dtheta
            add_pre_act(x, weights, theta, sae.decoder_norms, dead, self._aux, self._gradients, dtheta)
        return self._aux.losses

    def values(self, record: Record) -> dict[str, Any]:
        found, config, n = super().values(record), self.jump.config, self.n_rows
        if record.with_aux:
            numbers = record.numbers.tolist()
            term = numbers[RECORD.index("auxk")] / (1 if config.revival == "auxk" else n)
            weight = AUXK_ALPHA * numbers[-1] / n if config.revival == "auxk" else config.pre_act_coefficient
            found |= {config.revival: term, "loss": found["loss"] + weight * term}
        return found
