"""One end of a feature: its positive activations, or its negative ones.

In most SAEs features are never negative and have one end; a signed feature (AbsTopK, signed matching pursuit) is an axis
with two. Each end has its own metrics, examples and steering units, measured on magnitudes.
"""

from __future__ import annotations

from typing import Any, Literal

from saelab.features.reader import StoreReader
from saelab.features.records import Example, Histogram, Logits


class Steerable:
    """Builds edits for `lm.steer`, by `feature * strength` or by name."""

    @property
    def handle(self) -> Any:
        """The `saelab.steering.FeatureHandle` behind the edits; loads the SAE on first use."""
        raise NotImplementedError

    def __mul__(self, strength: float) -> Any:
        """An edit that adds `strength` times p99: `with lm.steer(feature * 2.0)`. Positive strengths push towards the
        dominant end of a feature, or for an `End`, towards that end."""
        return self.handle * strength

    __rmul__ = __mul__

    def add(self, value: float, unit: str = "p99") -> Any:
        """An edit that adds `value` in `unit` ("p99", "max", "mean", "raw") to the feature's activation, or with "resid_norm" its
        direction in multiples of each activation's norm."""
        return self.handle.add(value, unit=unit)

    def clamp(self, value: Any, unit: str = "p99", where: str = "always") -> Any:
        """An edit that sets the activation to `value` on every token, or with `where="fires"` only where the feature fires."""
        return self.handle.clamp(value, unit=unit, where=where)

    def scale(self, factor: float) -> Any:
        """An edit that multiplies the activation by `factor`."""
        return self.handle.scale(factor)

    def ablate(self) -> Any:
        """An edit that sets the activation to zero."""
        return self.handle.ablate()

    def cap(self, min: float | None = None, max: float | None = None, unit: str = "p99") -> Any:
        """An edit that keeps the activation between `min` and `max`; None is no bound."""
        return self.handle.cap(min, max, unit=unit)

    def project_out(self) -> Any:
        """An edit that removes the decoder row's direction from every activation."""
        return self.handle.project_out()

    def above(self, value: float, unit: str = "p99") -> Any:
        """A gate, open where the activation exceeds `value`: `lm.steer(..., gate=feature.above(0.5))`."""
        return self.handle.above(value, unit=unit)


class End(Steerable):
    """`feature.positive` or `feature.negative`. `mean`, `std`, `p99` and `max` are over the magnitudes at this end. Positive
    strengths steer towards it; `scale`, `ablate` and `clamp(where="fires")` leave the other end alone."""

    def __init__(self, store: StoreReader, feature: int, row: dict[str, Any]) -> None:
        self.store, self.feature = store, feature
        self.sign: Literal[-1, 1] = row["sign"]
        self.n_fired: int = row["n_fired"]
        self.density: float = self.n_fired / store.n_tokens
        self.mean: float = row["mean"]
        self.std: float = row["std"]
        self.p99: float = row["p99"]
        self.max: float = row["max"]

    @property
    def name(self) -> str:
        """ "positive" or "negative"."""
        return "positive" if self.sign > 0 else "negative"

    def examples(self, limit: int | None = None, *, kind: str = "top") -> list[Example]:
        """Examples at this end: the strongest ("top"), or of kind "quantile" or "uniform" (see `Feature.examples`)."""
        if kind not in ("top", "quantile", "uniform"):
            raise ValueError(f"kind={kind!r} is unknown; an end has top, quantile and uniform examples.")
        return self.store.examples(self.feature, self.sign, limit, kind)

    @property
    def histogram(self) -> Histogram:
        """Log-histogram of the magnitudes."""
        return self.store.histogram(self.feature, self.sign)

    @property
    def top_logits(self) -> Logits:
        """Tokens that the feature promotes and suppresses most at this end, per unit of magnitude."""
        logits = self.store.logits(self.feature)
        return logits if self.sign > 0 else logits.mirrored()

    @property
    def handle(self) -> Any:
        from saelab.edits.feature_handle import FeatureHandle

        units = {"p99": self.p99, "max": self.max, "mean": self.mean}
        return FeatureHandle(self.store.sae, self.feature, self.store.hook_name, units=units, end=self.sign)

    def __repr__(self) -> str:
        return f"<{self.name} end of feature {self.feature}: fired on {self.n_fired:,} tokens, p99 {self.p99:.3g}>"
