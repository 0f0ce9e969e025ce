"""Features as one HTML file that stands on its own: the notebook's cards, for a mail, an issue or a paper's supplement.

At most 300 kB, light and dark, without scripts; a policy in its head keeps it from loading anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelab.features.render import card_html, model_label
from saelab.features.style import CARD_STYLE
from saelab.features.visible import escape
from saelab.files import atomic_write_text

MAX_BYTES = 300_000
_FRAME = 6_000  # bytes of head, style and foot
_SIZES = ((20, True), (10, True), (5, True), (3, True), (3, False), (1, False))
"""(examples, with promoted tokens) of a card: the first that fits is taken."""
_STYLE = """
body{margin:1.5rem auto;max-width:62rem;padding:0 1rem;font-family:system-ui,sans-serif;background:#f6f6f4;color:#1f2328}
nav,footer{font-size:.85rem;line-height:1.7;margin:1rem 0}nav a{color:inherit;margin-right:1.2em;display:inline-block}
section{margin:1rem 0}.sl-card{max-width:none}
@media (prefers-color-scheme:dark){body{background:#0e1013;color:#e8eaed}}
@media (max-width:600px){.sl-row{grid-template-columns:minmax(0,1fr)}.sl-val{text-align:left}}
"""


def features_html(features: Sequence[Any], title: str = "") -> str:
    """The page of one or several features of a store, in this order, under 300 kB: of many features with fewer examples and
    without promoted tokens, of very many the first ones. Raises `ValueError` for an empty list."""
    if not features:
        raise ValueError("features is empty: name at least one.")
    cards = next((found for size in _SIZES if len(found := _cards(features, *size)) == len(features)), None)
    cards = cards or _cards(features, *_SIZES[-1])
    shown, first = features[: len(cards)], features[0]
    name = title or (f"Feature {first.feature}" if len(features) == 1 else f"{len(features)} features")
    links = "".join(_link(feature) for feature in shown) if len(features) > 1 else ""
    more = (
        f"<p>The other {len(features) - len(cards):,} features did not fit.</p>" if len(cards) < len(features) else ""
    )
    manifest = first.store.manifest
    source = (
        f"SAE {manifest['sae']['hash'][:10]} on {first.hook_name} of {model_label(manifest['model']['name'])}; features counted "
        f"on {first.store.n_tokens:,} tokens ({manifest['split'].replace('_', '-')})."
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(name)} \u00b7 saelab</title>'
        f"<style>{CARD_STYLE}{_STYLE}</style></head><body><h1><bdi>{escape(name)}</bdi></h1><nav>{links}</nav>"
        f"{''.join(cards)}{more}<footer>{escape(source)} Made with saelab.</footer></body></html>"
    )


def write_features(features: Sequence[Any], path: str | Path, title: str = "") -> Path:
    """Write `features_html` to `path`, atomically."""
    path = Path(path)
    atomic_write_text(path, features_html(features, title))
    return path


def _cards(features: Sequence[Any], n_examples: int, logits: bool) -> list[str]:
    """A card of each feature, up to the first that does not fit."""
    cards, left = [], MAX_BYTES - _FRAME
    for feature in features:
        card = f'<section id="feature-{feature.feature}">{card_html(feature, n_examples, logits)}</section>'
        left -= len(card.encode()) + len(_link(feature).encode())
        if left < 0:
            break
        cards.append(card)
    return cards


def _link(feature: Any) -> str:
    return (
        f'<a href="#feature-{feature.feature}">{feature.feature} <bdi>{escape((feature.label or "")[:60])}</bdi></a> '
    )
