"""One feature of a store: its metrics and examples; the same object is used to steer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from saelab.errors import SaelabError, StoreError
from saelab.features.effect import MeasuredEffect, read_effect
from saelab.features.end import End, Steerable
from saelab.features.html_file import write_features
from saelab.features.manifest import SIGNS_MIXED
from saelab.features.records import Example, Histogram, Logits, Promoted
from saelab.features.render import feature_card, feature_text
from saelab.features.weight_shares import head_shares, source_norms

EXAMPLE_KINDS = ("top", "bottom", "quantile", "uniform", "near_miss")


class Feature(Steerable):
    """A feature, as `store.feature(i)` returns it: shown as a card in a notebook, turned into an edit when multiplied.

    `n_fired` and `density` are the number and the share of counted tokens with a non-zero activation. `mean`, `std`, `p99`
    and `max` (None when it never fired) are over the magnitudes at the dominant end, the sign it fires with most often:
    `sign`, 1 or -1. `positive` and `negative` are the two ends. `cosine` is between the encoder and decoder rows.
    """

    def __init__(self, store: Any, row: dict[str, Any]) -> None:
        self.store = store
        self.row = row
        self.feature: int = row["feature"]
        self.hook_name = store.hook_name
        self.n_fired: int = row["n_fired"]
        self.density: float = row["density"]
        self.sign: int | None = row["sign"]
        self.mean: float | None = row["mean"]
        self.std: float | None = row["std"]
        self.p99: float | None = row["p99"]
        self.max: float | None = row["max"]
        self.cosine: float | None = row["cosine"]
        self.sharpness: float | None = row["sharpness"]
        self._ends: tuple[End, ...] | None = None

    @property
    def label(self) -> str | None:
        """The label written by hand, else by a model, else the words at its peaks; None if it never fired."""
        return self.store.labels.get(self.feature) or self.row["label"]

    @property
    def scores(self) -> dict[str, Any]:
        """Scores of its label and of steering with it, by name, from the annotations."""
        kinds = ("score", "steer", "effect")
        found = [entry for kind in kinds for entry in self.store.annotations.latest(kind, feature=self.feature)]
        return {entry.name or entry.kind: entry.value for entry in found}

    def effect(self, lm: Any = None, n_examples: int | None = None) -> MeasuredEffect | None:
        """What zeroing the feature changes at its strongest examples, measured with `lm` and kept in the annotations; without a
        model, what they hold, None if it has not been measured. See `measuring.measure_effect`, also for what is raised."""
        if lm is not None:
            from saelab.features.measuring import measure_effect

            return self.keep_effect(measure_effect(self, lm, n_examples))
        found = self.store.annotations.latest("effect", "", self.feature)
        return read_effect(found[0].value) if found else None

    def keep_effect(self, effect: MeasuredEffect) -> MeasuredEffect:
        """Add a measured effect to the annotations."""
        self.store.annotations.add(self.feature, "effect", effect.as_json())
        return effect

    def neighbours(self, *, by: str = "decoder", k: int = 20) -> list[dict[str, Any]]:
        """As `store.neighbours`."""
        return self.store.neighbours(self.feature, by=by, k=k)

    def interactions(self, k: int = 20, lm: Any = None, **options: Any) -> list[dict[str, Any]]:
        """As `store.interactions`."""
        return self.store.interactions(self.feature, k, lm, **options)

    @property
    def ends(self) -> tuple[End, ...]:
        """The ends at which it fired, the dominant one first."""
        if self._ends is None:
            self._ends = tuple(End(self.store, self.feature, row) for row in self.store.ends(self.feature))
        return self._ends

    @property
    def positive(self) -> End:
        """The positive end: `feature.positive * 2.0` steers towards it even if the negative end dominates. Raises `SaelabError`
        when the feature was never positive."""
        return self._end(1)

    @property
    def negative(self) -> End:
        """The negative end, under the same condition."""
        return self._end(-1)

    def _end(self, sign: int) -> End:
        if self.store.signed is None:
            raise StoreError(f"Feature {self.feature}: {SIGNS_MIXED}")
        for end in self.ends:
            if end.sign == sign:
                return end
        name, others = ("positive", "negative") if sign > 0 else ("negative", "positive")
        instead = f"use feature.{others}" if self.ends else "choose a feature that fires"
        raise SaelabError(
            f"Feature {self.feature} never fired at its {name} end on the {self.store.n_tokens:,} counted tokens, so that end "
            f"has no examples and no steering unit: {instead}."
        )

    @property
    def dominant_logits(self) -> Logits:
        """`top_logits` of the dominant end: what steering with positive strength promotes and suppresses."""
        return self.top_logits.mirrored() if self.sign == -1 else self.top_logits

    @property
    def promoted(self) -> Promoted:
        """Tokens that its decoder row promotes and suppresses more than other rows do, at the dominant end. What the feature does
        in the model is `effect`."""
        found = self.store.promoted(self.feature)
        return found.mirrored() if self.sign == -1 else found

    def examples(self, limit: int | None = None, *, kind: str = "top") -> list[Example]:
        """Examples: all that are stored, or `limit` of them; [] where the feature never fired.

        `kind="top"`: the strongest of the dominant end, one per document; "bottom": those of the other end. "quantile": from five
        groups of equally many firings, the strongest group first; "uniform": a uniform sample of firings; both of the dominant
        end. "near_miss": tokens on which the feature nearly fired. Raises `ValueError` for an unknown kind, `StoreError` for
        "bottom" in a store that mixed the signs, and for what a store of an earlier saelab does not hold.
        """
        if kind not in EXAMPLE_KINDS:
            raise ValueError(f"kind={kind!r} is unknown; expected one of {', '.join(EXAMPLE_KINDS)}.")
        if kind == "bottom" and self.store.signed is None:
            raise StoreError(f"Feature {self.feature}: {SIGNS_MIXED}")
        sign = self.sign or 1
        if kind == "bottom":
            return self.store.examples(self.feature, -sign, limit)
        return self.store.examples(self.feature, sign, limit, kind)

    @property
    def head_shares(self) -> list[float] | None:
        """As `weight_shares.head_shares`: for a feature at `hook_z`."""
        return head_shares(self.store, self.feature)

    @property
    def source_norms(self) -> list[dict[str, Any]] | None:
        """As `weight_shares.source_norms`: for a crosscoder's feature."""
        return source_norms(self.store, self.feature)

    @property
    def histogram(self) -> Histogram:
        """Exact log-histogram of the non-zero activations; empty when the feature never fired."""
        if self.store.signed is None:
            return self.store.histogram(self.feature)
        shown = [end.histogram if end.sign > 0 else end.histogram.mirrored() for end in self.ends]
        if len(shown) < 2:
            return shown[0] if shown else Histogram(np.zeros(1), np.zeros(0, dtype=np.int64))
        low, high = sorted(shown, key=lambda histogram: histogram.edges[0])
        counts = np.concatenate([low.counts, np.zeros(1, dtype=np.int64), high.counts])
        return Histogram(np.concatenate([low.edges, high.edges]), counts)

    @property
    def top_logits(self) -> Logits:
        """Tokens that one unit along the decoder row promotes and suppresses most; empty off the residual stream. For
        each end see `end.top_logits`."""
        return self.store.logits(self.feature)

    @property
    def handle(self) -> Any:
        """The `saelab.steering.FeatureHandle` behind the edits, in signed units; loads the SAE on first use."""
        from saelab.edits.feature_handle import FeatureHandle

        if self.store.signed is None:
            return FeatureHandle(self.store.sae, self.feature, self.hook_name, no_units=SIGNS_MIXED)
        units = {"p99": self.p99, "max": self.max, "mean": self.mean}
        known = {name: value * (self.sign or 1) for name, value in units.items() if value is not None}
        return FeatureHandle(self.store.sae, self.feature, self.hook_name, units=known)

    def to_html(self, path: str | Path) -> Path:
        """Write the feature as one HTML file of at most 300 kB that stands on its own; returns its path."""
        return write_features([self], path)

    def __repr__(self) -> str:
        return feature_text(self)

    def _repr_html_(self) -> str:
        return feature_card(self)
