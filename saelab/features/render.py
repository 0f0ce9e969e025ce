"""Renders a feature as HTML: examples with highlighted tokens, and the notebook card.

Token text comes from the web and is untrusted: it reaches the page only through the escaping of `visible.py`. The HTML has
no script and loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from saelab.features.histogram_html import histogram_html, quantiles_of
from saelab.features.manifest import SIGNS_MIXED
from saelab.features.numbers import number, percent, signed
from saelab.features.records import Example, FeatureNumbers, PromotedToken
from saelab.features.schema import bin_name
from saelab.features.style import CARD_STYLE
from saelab.features.token_text import Group, display_groups
from saelab.features.visible import chip_text, escape, visible

HIGHLIGHT, NEGATIVE = "230,159,0", "86,180,233"
_MAX_ALPHA = 0.5  # text on it keeps a contrast of 4.5, light and dark
_MAX_AROUND = 10_000
"""Tokens of a document that are rendered on each side of the window."""


class DocumentLinks(NamedTuple):
    """Makes the place of each example a link that opens its whole document below it."""

    address: Callable[[str], str]
    """The address at which the example of that `place` is open; "" for none."""
    opened: str = ""
    """The `place` of the example that is open."""


def feature_examples_html(
    feature: FeatureNumbers, limit: int | None = None, kind: str = "top", links: DocumentLinks | None = None
) -> str:
    """HTML of the examples at one end of a feature; highlights are relative to the largest magnitude of the same sign."""
    largest = {end.sign: end.max for end in feature.ends}
    examples = feature.examples(limit, kind=kind)
    return examples_html(examples, largest.get(1, feature.max), largest.get(-1), kind, links)


def examples_html(
    examples: Sequence[Example],
    maximum: float | None,
    negative: float | None = None,
    kind: str = "top",
    links: DocumentLinks | None = None,
) -> str:
    """One HTML block for a list of examples; highlights are relative to `maximum`, the feature's largest value, and for
    negative values to `negative`, their largest magnitude (None: `maximum`). A token shows its value while it is pointed at or
    focused; each example is one tab stop, its peak."""
    if not examples:
        return '<div class="sl">No examples: the feature did not fire on any counted token.</div>'
    scale, rows, group = _Scale(maximum, negative), [], None
    for example in examples:
        if example.quantile != group:
            group = example.quantile
            rows.append(_group_head(group))
        rows.append(_example_row(example, scale, links))
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


def _example_row(example: Example, scale: _Scale, links: DocumentLinks | None) -> str:
    return (
        f'<div class="sl-row" role="listitem"><div class="sl-val">{number(example.value)}{_place(example, links)}</div>'
        f'<div class="sl-text"><bdi>{_example_text(example, scale)}</bdi></div>'
        f"{_document(example, scale) if links is not None and links.opened == example.place else ''}</div>"
    )


def _place(example: Example, links: DocumentLinks | None) -> str:
    """Where the example is from."""
    document, token = example.place.split(":")
    where = f"document {document}, token {token} of the {'document' if example.document_position is not None else 'context'}"
    shown = f"doc&nbsp;{document}&thinsp;:&thinsp;{token}"
    if links is None:
        return f'<span class="sl-src" title="{where}">{shown}</span>'
    is_open = links.opened == example.place
    address = escape(links.address("" if is_open else example.place))
    title = f"{where}: {'close' if is_open else 'show'} the whole document"
    return (
        f'<a class="sl-src sl-go" href="{address}" target="_self" title="{title}" aria-label="{title}" '
        f'aria-expanded="{str(is_open).lower()}">{shown}</a>'
    )


def _document(example: Example, scale: _Scale) -> str:
    """The whole document of an example: the window in which its values are stored between two bars, the rest plain text."""
    full, start, stop = example.store.document(example.document).around(example)
    first, last = max(0, start - _MAX_AROUND), stop + _MAX_AROUND
    before, after = (
        "".join(g.text for g in display_groups(side)) for side in (full.pieces[first:start], full.pieces[stop:last])
    )
    n = len(full.pieces)
    left_out = n - (min(last, n) - first)
    note = f"Document {example.document}: {n:,} tokens" + (
        f", of which {left_out:,} far away are left out" if left_out else ""
    )
    window = replace(full, pieces=full.pieces[start:stop], values=full.values[start:stop], peak=full.peak - start)
    return (
        f'<div class="sl-doc sl-text" tabindex="0" role="region" aria-label="{note}"><div class="sl-sub">{note}. Activations are '
        f"stored for the {stop - start} tokens between the bars.</div><bdi>{_plain(before)}"
        f'<span class="sl-window">{_example_text(window, scale)}</span>{_plain(after)}</bdi></div>'
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
    style = f"background:rgba({NEGATIVE if strongest < 0 else HIGHLIGHT},{_MAX_ALPHA * share:.2f})"
    at = f' data-at="{bin_name(strongest)}"' if strongest else ""
    shown = group.text.lstrip(" ") or group.text  # a space at the end of a line would be a box of its own
    return (
        f"{_plain(group.text[: -len(shown)])}"
        f'<bdi class="sl-t{" sl-peak" if is_peak else ""}" role="img" tabindex="{0 if is_peak else -1}"{at} '
        f'data-v="{number(strongest)}" aria-label="{escape(title)}" style="{style}">{_plain(shown)}</bdi>'
    )


def fixed(value: float | None, digits: int) -> str:
    """A metric with this many decimals, so that those of a column line up; an en dash for None."""
    return "\u2013" if value is None else f"{value:,.{digits}f}"


def model_label(name: str) -> str:
    """A model's name; for a local path, its last component."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name


def cosine(value: float | None) -> str:
    """A cosine to two decimals; an en dash for None."""
    return "\u2013" if value is None else f"{value:.2f}"


def feature_card(feature: FeatureNumbers, n_examples: int = 10) -> str:
    """A self-contained notebook card: inline style, no script; follows the browser's light or dark mode."""
    return f"<style>{CARD_STYLE}</style>{card_html(feature, n_examples)}"


def card_html(feature: FeatureNumbers, n_examples: int, logits: bool = True) -> str:
    """The card without its style; `logits` says whether with the tokens that the feature promotes."""
    stats = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _stats(feature))
    promoted, suppressed = feature.promoted
    model = model_label(feature.store.manifest["model"]["name"])
    note = "".join(f'<p class="sl-sub">{escape(line)}</p>' for line in [signs_text(feature)] if line)
    other = ""
    if len(feature.ends) > 1:
        title = f"Examples of the other end ({feature.ends[1].name})"
        other = f"<h4>{title}</h4>{feature_examples_html(feature, n_examples, 'bottom')}"
    tokens = (
        (
            f"<h4>Its decoder row promotes (z-score over features, logit change)</h4>{chips_html(promoted)}"
            f"<h4>and suppresses</h4>{chips_html(suppressed)}"
        )
        if logits
        else ""
    )
    return (
        f'<div class="sl-card sl-marks"><h3>Feature {feature.feature}</h3>'
        f'<p class="sl-label"><bdi>{escape(feature.label or "")}</bdi></p>'
        f'<p class="sl-sub">{escape(feature.hook_name)} \u00b7 {escape(model)}</p>'
        f'<dl class="sl-stats">{stats}</dl>{note}'
        f"<h4>Top examples</h4>{feature_examples_html(feature, n_examples)}{other}"
        f"<h4>Activations</h4>{feature_histogram_html(feature)}{tokens}</div>"
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


def feature_histogram_html(feature: FeatureNumbers) -> str:
    """The histogram of a feature with the quantiles of each of its ends."""
    quantiles = [one for end in feature.ends for one in quantiles_of(end, end.histogram)]
    return histogram_html(feature.histogram, quantiles)


def chips_html(tokens: Sequence[PromotedToken]) -> str:
    """Tokens with the z-score and the size of their logit change, as a row of chips."""
    if not tokens:
        return '<div class="sl-sub">No direct path to the logits from this hook.</div>'
    chips = "".join(
        f'<bdi class="sl-chip">{chip_text(token.text)}<small>{signed(token.z, 1)}, {signed(token.logit, 2)}</small></bdi>'
        for token in tokens
    )
    return f'<div class="sl-chips">{chips}</div>'


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
