"""What a feature does in its model, measured by zeroing it at its own strongest examples: the record, and how it is shown.

`measuring.py` measures. The record is kept in the annotations and read from there without the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from saelab.features.numbers import number, signed
from saelab.features.style import STYLE
from saelab.features.visible import chip_text, visible

_MAX_TEXT = 80


class Estimate(NamedTuple):
    """A mean over examples and its 95 % interval, resampled over examples; None for an interval of one example."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" (95 % interval {number(self.low)} to {number(self.high)})"
        return (number(self.mean) + bounds).replace("-", "\u2212")


class TokenChange(NamedTuple):
    """What zeroing the feature changes for one token of the vocabulary."""

    text: str
    change: Estimate
    """Of its log-probability, in nats."""
    before: float
    """Its mean probability with the feature, and without it."""
    after: float


class MeasuredEffect(NamedTuple):
    """The feature zeroed, everything else kept, against the model unchanged. Means over examples, in each over its tokens."""

    n_examples: int
    n_tokens: int
    """Tokens that were scored: those that follow the peaks in their documents, and the predictions of them."""
    loss: Estimate
    """Change of the loss per token, in nats; positive: the feature helps to predict."""
    kl: Estimate
    """KL divergence of the model without the feature from the model with it, per token, in nats."""
    down: tuple[TokenChange, ...]
    """The tokens that become less likely without the feature: what it promotes. The largest change first."""
    up: tuple[TokenChange, ...]
    """Those that become more likely: what it suppresses."""
    control: float
    """The largest change of a log-probability when nothing is zeroed, by the same edit: 0 unless the model is random."""

    def as_json(self) -> dict[str, Any]:
        """As the annotations keep it; `read_effect` reads it."""
        sides = {name: [one._asdict() for one in getattr(self, name)] for name in ("down", "up")}
        return self._asdict() | sides

    def __str__(self) -> str:
        tokens = [
            f"  {name}: " + (", ".join(f"{visible(one.text)!r} {one.change.mean:+.2f}" for one in side) or "none")
            for name, side in (("less likely without it", self.down), ("more likely without it", self.up))
        ]
        return "\n".join([summary(self), *tokens])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{effect_html(self)}"


def read_effect(value: Any) -> MeasuredEffect | None:
    """The record of an annotation; None for what is none, since annotations may come from others."""
    try:
        fields = dict(value)
        for name in ("loss", "kl"):
            fields[name] = _estimate(fields[name])
        for name in ("down", "up"):
            fields[name] = tuple(_token(**token) for token in fields[name])
        fields |= {name: int(fields[name]) for name in ("n_examples", "n_tokens")} | {
            "control": float(fields["control"])
        }
        return MeasuredEffect(**fields)
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def _estimate(value: Any) -> Estimate:
    return Estimate(float(value[0]), *(None if bound is None else float(bound) for bound in value[1:]))


def _token(text: Any, change: Any, before: Any, after: Any) -> TokenChange:
    return TokenChange(str(text)[:_MAX_TEXT], _estimate(change), float(before), float(after))


def summary(effect: MeasuredEffect) -> str:
    """One line: what was measured, on how much, and the control."""
    return (
        f"Zeroed in {effect.n_examples} of its strongest examples, {effect.n_tokens:,} tokens from the peaks on: loss per token "
        f"changes by {effect.loss} nats, KL divergence {effect.kl} nats. Zeroing nothing changes "
        f"{'nothing' if effect.control == 0 else f'a log-probability by up to {number(effect.control)}'}."
    )


def effect_html(effect: MeasuredEffect) -> str:
    """The tokens that zeroing the feature makes less and more likely, as two tables."""
    return _table("Less likely without it", effect.down) + _table("More likely without it", effect.up)


def _table(title: str, tokens: Sequence[TokenChange]) -> str:
    if not tokens:
        return f'<div class="sl-sub">{title}: no token of a probability worth naming.</div>'
    rows = "".join(
        f'<tr><td><bdi class="sl-chip">{chip_text(one.text)}</bdi></td><td>{signed(one.change.mean, 2)}'
        f'<span class="sl-src">{_interval(one.change)}</span></td><td>{_share(one.before)} \u2192 {_share(one.after)}%</td></tr>'
        for one in tokens
    )
    heads = "".join(f"<th>{head}</th>" for head in (title, "Log-prob. (95 %)", "Probability"))
    return f'<table class="sl-table"><tr>{heads}</tr>{rows}</table>'


def _interval(change: Estimate) -> str:
    return "one example" if change.low is None else f"{signed(change.low, 2)} to {signed(change.high, 2)}"


def _share(probability: float) -> str:
    return f"{100 * probability:.2g}" if probability < 0.995 else "100"


def not_measurable(manifest: dict[str, Any]) -> str | None:
    """Why no feature of this store can be zeroed, in a sentence; None where it can."""
    hooks = manifest.get("sites") or {}
    inputs, outputs = (hooks.get(name) or [manifest["hook_name"]] for name in ("reads", "writes"))
    if len(inputs) == 1 and outputs == inputs:
        return None
    return (
        f"Its activation is computed from {', '.join(inputs)}, so it cannot be zeroed at {outputs[-1]} alone, where edits act: "
        "its effect is not measured."
    )
