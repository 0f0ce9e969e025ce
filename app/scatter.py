"""The points of the Map page: a canvas, as plotly draws so many by WebGL only, which needs a policy that allows eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streamlit.components.v2 import component

LISTED = 255
"""The shade of features in the list."""

_HTML = """
<div class="map">
  <canvas></canvas><canvas role="img" tabindex="0"></canvas><div class="tip" hidden></div>
  <div class="legend"><span class="low"></span><span class="ramp"></span><span class="high"></span><span class="zoom">
  <button type="button" aria-label="Zoom in">+</button><button type="button" aria-label="Zoom out">&minus;</button>
  <button type="button" aria-label="Show all">All</button></span></div>
</div>
"""
_CSS = """
.map{position:relative;height:min(72vh,44rem);font-family:var(--st-font);color:var(--st-text-color);font-size:.85rem}
canvas{position:absolute;inset:0;width:100%;touch-action:pan-y;border:1px solid rgba(128,128,128,.35);border-radius:6px;
box-sizing:border-box}
canvas+canvas{cursor:crosshair;border-color:transparent}
canvas:focus-visible{outline:2px solid currentColor}
.tip{position:absolute;pointer-events:none;max-width:20rem;padding:.15rem .5rem;border-radius:4px;overflow-wrap:anywhere;
background:var(--st-background-color);border:1px solid rgba(128,128,128,.6)}
.legend{position:absolute;bottom:0;left:0;right:0;display:flex;flex-wrap:wrap;align-items:center;gap:.3rem .5rem;
padding-top:.4rem}
.ramp{width:6rem;height:.6rem;border-radius:2px}
.zoom{margin-left:auto;display:flex;gap:.3rem}
button{min-width:2rem;padding:.1rem .5rem;border:1px solid rgba(128,128,128,.6);border-radius:4px;background:none;color:inherit;
font:inherit;cursor:pointer}
button:focus-visible{outline:2px solid currentColor}
"""
_mount = component(
    "saelab_map", html=_HTML, css=_CSS, js=Path(__file__).with_name("scatter.js").read_text(encoding="utf-8")
)


def packed(xy: np.ndarray, shade: np.ndarray, ids: Sequence[int], labels: Sequence[str], **head: Any) -> bytes:
    """The points as `scatter.js` reads them: `xy (n, 2)`, `shade (n,)` from 0 to 254 or `LISTED`."""
    text = json.dumps({"ids": list(ids), "labels": list(labels), **head}, ensure_ascii=False).encode()
    return len(text).to_bytes(4, "little") + text + xy.astype("<f4").tobytes() + shade.astype(np.uint8).tobytes()


def shades(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 254, by the place of each value between the 1st and the 99th percentile; NaN as the lowest."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values), dtype=np.uint8)
    low, high = np.percentile(known, [1, 99])
    share = (np.nan_to_num(values, nan=low, neginf=low, posinf=high) - low) / max(high - low, 1e-12)
    return (254 * share.clip(0, 1)).astype(np.uint8)


def show(points: bytes, key: str) -> Any:
    """Show the points; "lasso" of the result are the corners of a polygon that was just drawn, or None."""
    return _mount(key=key, data=points, on_lasso_change=_nothing)


def _nothing() -> None:
    """A component has only the triggers for which there is a callback."""
