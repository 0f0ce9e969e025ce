"""Renders a feature as HTML: examples with highlighted tokens, and the notebook card.

Token text comes from the web and is untrusted: it reaches the page only through the escaping of `visible.py`. The HTML has
no script and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saelab.features.manifest import SIGNS_MIXED
from saelab.features.records import Example, FeatureNumbers, Histogram
from saelab.features.token_text import Group, display_groups
from saelab.features.visible import chip_text, escape, visible

HIGHLIGHT, NEGATIVE = "230,159,0", "86,180,233"
_MAX_ALPHA = 0.6

STYLE = """
.sl{font-family:inherit;color:inherit;line-height:1.5}
.sl-row{display:grid;grid-template-columns:5.4rem minmax(0,1fr);gap:1rem;padding:.6rem .1rem;align-items:baseline;
border-bottom:1px solid rgba(128,128,128,.22)}
.sl-row:last-child{border-bottom:0}
.sl-group{font-size:.76rem;font-weight:600;opacity:.8;padding:.7rem .1rem 0}
.sl-val{font-variant-numeric:tabular-nums;text-align:right;font-weight:600}
.sl-src{display:block;white-space:nowrap;font-weight:400;font-size:.72rem;opacity:.72}
.sl-text{overflow-wrap:anywhere;white-space:pre-wrap;font-size:.95rem;line-height:1.75}
.sl-t{border-radius:3px;padding:.1em 0}
.sl-t:focus-visible{outline:2px solid currentColor;outline-offset:1px}
.sl-peak{outline:1.5px solid currentColor;outline-offset:0;margin:0 2px;padding:.1em 1px;font-weight:700;
text-decoration:underline;text-underline-offset:3px}
.sl-g{opacity:.55}
"""


def feature_examples_html(feature: FeatureNumbers, limit: int | None = None, kind: str = "top") -> str:
    """HTML of the examples at one end of a feature; highlights are relative to the largest magnitude of the same sign."""
    largest = {end.sign: end.max for end in feature.ends}
    return examples_html(feature.examples(limit, kind=kind), largest.get(1, feature.max), largest.get(-1), kind)


def examples_html(
    examples: Sequence[Example], maximum: float | None, negative: float | None = None, kind: str = "top"
) -> str:
    """One HTML block for a list of examples; highlights are relative to `maximum`, the feature's largest value, and for
    negative values to `negative`, their largest magnitude (None: `maximum`)."""
    if not examples:
        return '<div class="sl">No examples: the feature did not fire on any counted token.</div>'
    scale, rows, group = _Scale(maximum, negative), [], None
    for example in examples:
        if example.quantile != group:
            group = example.quantile
            rows.append(_group_head(group))
        rows.append(_example_row(example, scale))
    name = kind.replace("_", " ").capitalize()
    return f'<div class="sl" role="list" aria-label="{name} examples">{"".join(rows)}</div>'


def _group_head(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return ""
    low, high = bounds
    text = (
        f"the strongest {1 - low:.0%}"
        if high == 1
        else f"the weakest {high:.0%}"
        if low == 0
        else f"{low:.0%} to {high:.0%}"
    )
    return f'<div class="sl-group" role="listitem">{text} of firings</div>'


class _Scale(NamedTuple):
    positive: float | None
    negative: float | None

    def share(self, value: float) -> float:
        """Magnitude relative to the largest at the same end, at most 1."""
        largest = abs((self.negative if value < 0 else None) or self.positive or 0.0)
        return min(1.0, abs(value) / largest) if largest else float(value != 0)


def _example_row(example: Example, scale: _Scale) -> str:
    token, of = example.document_position, "document"
    if token is None:
        token, of = example.position, "context"
    title = f"document {example.document}, token {token} of the {of}"
    return (
        f'<div class="sl-row" role="listitem"><div class="sl-val">{number(example.value)}'
        f'<span class="sl-src" title="{title}">doc&nbsp;{example.document}&thinsp;:&thinsp;{token}</span></div>'
        f'<div class="sl-text"><bdi>{_example_text(example, scale)}</bdi></div></div>'
    )


def _example_text(example: Example, scale: _Scale) -> str:
    """The tokens of one example; a run of tokens without activation becomes plain text."""
    parts, silent = [], ""
    for group in display_groups(example.pieces):
        if any(example.values[group.start : group.stop]) or group.start <= example.peak < group.stop:
            parts += [_plain(silent), _group_html(example, group, scale)]
            silent = ""
        else:
            silent += group.text
    return "".join([*parts, _plain(silent)])


def _plain(text: str) -> str:
    return escape(text).replace("\u21b5", '<span class="sl-g">\u21b5</span><wbr>')


def _group_html(example: Example, group: Group, scale: _Scale) -> str:
    values = example.values[group.start : group.stop]
    strongest = max(values, key=abs)
    is_peak = group.start <= example.peak < group.stop
    share = scale.share(strongest)
    said, end = ", ".join(number(value) for value in values), " at the negative end" if strongest < 0 else ""
    title = f"token '{group.text}', activation {said}, {share:.0%} of maximum{end}" + (", peak" if is_peak else "")
    title = escape(title)
    style = f"background:rgba({NEGATIVE if strongest < 0 else HIGHLIGHT},{_MAX_ALPHA * share:.2f})"
    name = "sl-t sl-peak" if is_peak else "sl-t"
    return (
        f'<bdi class="{name}" role="img" tabindex="0" title="{title}" aria-label="{title}" style="{style}">'
        f"{_plain(group.text)}</bdi>"
    )


def number(value: float | None) -> str:
    """A metric to three significant digits, zeros included; an en dash for None."""
    if value is None:
        return "\u2013"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:#,.3g}".rstrip(".") if value and abs(value) < 999.5 else f"{value:,.0f}"


def fixed(value: float | None, digits: int) -> str:
    """A metric with this many decimals, so that those of a column line up; an en dash for None."""
    return "\u2013" if value is None else f"{value:,.{digits}f}"


def model_label(name: str) -> str:
    """A model's name; for a local path, its last component."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name


def cosine(value: float | None) -> str:
    """A cosine to two decimals; an en dash for None."""
    return "\u2013" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A fraction in per cent, with more digits below 1 %; an en dash for None."""
    if value is None:
        return "\u2013"
    return "0%" if value == 0 else f"{value:.3%}" if value < 0.01 else f"{value:.2%}"


CARD_STYLE = (
    STYLE
    + """
.sl-card{max-width:60rem;padding:1rem 1.2rem;border:1px solid rgba(128,128,128,.35);border-radius:8px;
font-family:system-ui,sans-serif;background:#fff;color:#1f2328}
@media (prefers-color-scheme:dark){.sl-card{background:#16181d;color:#e8eaed}}
.sl-card h3{margin:0;font-size:1.15rem}.sl-card h4{margin:.9rem 0 .3rem;font-size:.85rem;font-weight:600}
.sl-sub{font-size:.8rem;opacity:.75;margin:.1rem 0 .7rem}.sl-label{margin:.1rem 0;font-weight:600}
.sl-stats{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:0;font-variant-numeric:tabular-nums}
.sl-stats div{display:flex;flex-direction:column}.sl-stats dt{font-size:.72rem;opacity:.75}
.sl-stats dd{margin:0;font-weight:600}
.sl-chips{display:flex;flex-wrap:wrap;gap:.3rem}
.sl-chip{border:1px solid rgba(128,128,128,.4);border-radius:4px;padding:0 .4em;font-size:.85rem;white-space:pre}
.sl-chip small{opacity:.7;margin-left:.4em}
"""
)


def feature_card(feature: FeatureNumbers, n_examples: int = 10) -> str:
    """A self-contained notebook card: inline style, no script; follows the browser's light or dark mode."""
    return f"<style>{CARD_STYLE}</style>{card_html(feature, n_examples)}"


def card_html(feature: FeatureNumbers, n_examples: int, logits: bool = True) -> str:
    """The card without its style; `logits` says whether with the tokens that the feature promotes."""
    stats = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _stats(feature))
    promoted, suppressed = feature.dominant_logits
    model = model_label(feature.store.manifest["model"]["name"])
    note = "".join(f'<p class="sl-sub">{escape(line)}</p>' for line in [signs_text(feature)] if line)
    other = ""
    if len(feature.ends) > 1:
        title = f"Examples of the other end ({feature.ends[1].name})"
        other = f"<h4>{title}</h4>{feature_examples_html(feature, n_examples, 'bottom')}"
    tokens = f"<h4>Promotes</h4>{chips_html(promoted)}<h4>Suppresses</h4>{chips_html(suppressed)}" if logits else ""
    return (
        f'<div class="sl-card"><h3>Feature {feature.feature}</h3>'
        f'<p class="sl-label"><bdi>{escape(feature.label or "")}</bdi></p>'
        f'<p class="sl-sub">{escape(feature.hook_name)} \u00b7 {escape(model)}</p>'
        f'<dl class="sl-stats">{stats}</dl>{note}'
        f"<h4>Top examples</h4>{feature_examples_html(feature, n_examples)}{other}"
        f"<h4>Values (log scale)</h4>{histogram_svg(feature.histogram)}{tokens}</div>"
    )


def signs_text(feature: FeatureNumbers) -> str:
    """A note on the signs of a feature; "" for one that is never negative."""
    if feature.store.signed is None:
        return f"Metrics and examples are of the signed value: {SIGNS_MIXED}"
    if feature.sign in (None, 1) and len(feature.ends) < 2:
        return ""
    shares = ", ".join(
        f"{end.name} on {percent(end.n_fired / feature.n_fired)} of its firings (p99 {number(end.p99)}, max {number(end.max)})"
        for end in feature.ends
    )
    return (
        f"A signed feature: {shares}. Mean, p99, max and promoted tokens are those of its {feature.ends[0].name} end, "
        "towards which positive strengths steer."
    )


def _stats(feature: FeatureNumbers) -> list[tuple[str, str]]:
    return [
        ("fired", f"{feature.n_fired:,} of {feature.store.n_tokens:,} tokens"),
        ("density", percent(feature.density)),
        ("mean", number(feature.mean)),
        ("p99", number(feature.p99)),
        ("max", number(feature.max)),
        ("encoder\u2013decoder cosine", cosine(feature.cosine)),
    ]


def chips_html(tokens: Sequence[tuple[str, float]]) -> str:
    """Tokens with their logit changes, as a row of chips."""
    if not tokens:
        return '<div class="sl-sub">No direct path to the logits from this hook.</div>'
    chips = "".join(
        f'<bdi class="sl-chip">{chip_text(text)}<small>{value:+.2f}</small></bdi>' for text, value in tokens
    )
    return f'<div class="sl-chips">{chips}</div>'


def histogram_svg(histogram: Histogram, width: int = 480, height: int = 70) -> str:
    """The log-histogram as inline SVG, with its range and largest count as text."""
    counts = histogram.counts
    if not len(counts):
        return '<div class="sl-sub">No activations: the feature never fired.</div>'
    step, tallest = width / len(counts), counts.max()
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - height * count / tallest:.1f}" width="{max(1.0, step - 1):.1f}" '
        f'height="{height * count / tallest:.1f}"{_fill(edge)}/>'
        for i, (count, edge) in enumerate(zip(counts, histogram.edges[1:], strict=True))
    )
    label = f"{number(histogram.edges[0])} to {number(histogram.edges[-1])}, at most {tallest:,} per bin"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="Histogram: {label}" '
        f'style="max-width:100%;fill:rgb({HIGHLIGHT})">{bars}</svg><div class="sl-sub">{label}</div>'
    )


def _fill(right_edge: float) -> str:
    return f' style="fill:rgb({NEGATIVE})"' if right_edge <= 0 else ""


def feature_text(feature: FeatureNumbers) -> str:
    """The feature as text for a terminal: label, metrics, and three examples per end with the peak in brackets."""
    label = f": {visible(feature.label)}" if feature.label else ""
    lines = [f"Feature {feature.feature} of {feature.hook_name}{label}"]
    lines.append("  " + ", ".join(f"{name} {value}" for name, value in _stats(feature)))
    if signs := signs_text(feature):
        lines.append("  " + signs)
    shown = feature.examples(3) + (feature.examples(3, kind="bottom") if len(feature.ends) > 1 else [])
    lines += [f"  {number(example.value):>7}  {example_line(example)}" for example in shown]
    return "\n".join(lines)


def example_line(example: Example, left: int = 12, right: int = 6) -> str:
    """One line of text around the peak, the peak token in \u27e6 \u27e7."""
    before, peak, after = map(visible, around_peak(example, left, right))
    return f"{before}\u27e6{peak}\u27e7{after}"


def around_peak(example: Example, left: int, right: int) -> tuple[str, str, str]:
    """Text of up to `left` tokens before the peak, of the peak, and of up to `right` tokens after it."""
    texts = ["", "", ""]
    for group in display_groups(example.pieces):
        if group.stop > example.peak - left and group.start <= example.peak + right:
            texts[(group.stop > example.peak) + (group.start > example.peak)] += group.text
    return texts[0], texts[1], texts[2]
