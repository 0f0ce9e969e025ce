"""Runs page: the report, the training curves and the settings of every SAE in the run."""

from __future__ import annotations

import html
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import streamlit as st

from saelab.app import as_python, charts, state
from saelab.errors import SaelabError
from saelab.features.render import model_label, number, percent
from saelab.files import read_json
from saelab.runs import SaeRun

_MAX_POINTS = 1000
_CURVES = {
    "fvu": ("FVU (training)", False),
    "l0": ("L0", False),
    "dead_fraction_train": ("Dead fraction (training)", True),
}
_MEASURES = {
    "fvu": ("FVU", "Fraction of variance unexplained on held-out tokens; lower is better."),
    "fvu_unmasked": (
        "FVU unmasked",
        "The same without the mask: a few rows of huge norm dominate it, for better or worse.",
    ),
    "l0": ("L0", "Mean number of features that fire on a token."),
    "dead_fraction": ("Dead", "Fraction of features that never fired on the held-out tokens."),
    "ce_loss_recovered": (
        "CE recovered",
        "Share of the cross-entropy loss added by zero ablation that the SAE's reconstruction recovers; 1 is perfect.",
    ),
    "kl": (
        "KL",
        "KL divergence of the model's predictions when the reconstruction replaces the activations, in nats per token.",
    ),
}
_SHARES = {"dead_fraction", "ce_loss_recovered"}


def show() -> None:
    """Render the page."""
    st.title("Runs")
    found = state.saes()
    reports = [str(sae.report_path) for sae in found if sae.report_path.exists()]
    as_python.offer(
        "import json",
        "from pathlib import Path",
        "",
        f"reports = [json.loads(Path(path).read_text(encoding='utf-8')) for path in {reports}]",
        "for report in reports:",
        "    print(report['hook_name'], report['fvu'], report['l0'], report['ce_loss_recovered'])",
    )
    if len(found) > 1:
        _overview(found)
    for sae in found:
        _one(sae)


def _overview(found: list[SaeRun]) -> None:
    rows = []
    for sae in found:
        report = _read(sae.report_path)
        if not report:
            continue  # its own section says how to make one
        values = {label: report.get(key) for key, (label, _) in _MEASURES.items()}
        rows.append({"SAE": sae.name, "hook": report.get("hook_name"), **values, "tokens": report.get("n_tokens")})
    if rows:
        st.dataframe(rows, hide_index=True, alt="Held-out metrics of every SAE in this run")


def _one(sae: SaeRun) -> None:
    config = _read(sae.sae_dir / "sae.json")
    st.subheader(sae.name, divider="gray")
    model = config.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    parts = [config.get("variant"), config.get("hook_name"), model_label(str(name or ""))]
    known = " \u00b7 ".join(str(part) for part in parts if part)
    st.html(f'<p class="sa-sub">{html.escape(known)}</p>')
    report = _read(sae.report_path)
    if report:
        _measures(report)
    else:
        st.info(
            f"No report yet. `saelab eval {sae.sae_dir}` measures this SAE on held-out text.", icon=":material/info:"
        )
    _curves(sae)
    _settings(config)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} without the file, and {} with a warning where it does not hold an object."""
    try:
        value = read_json(path) if path.exists() else {}
        if isinstance(value, dict):
            return value
        raise SaelabError(
            f"{path} holds a {type(value).__name__}, expected an object: the file was altered; write it again."
        )
    except SaelabError as error:
        st.warning(str(error))
        return {}


def _measures(report: dict[str, Any]) -> None:
    columns = st.columns(len(_MEASURES))
    for column, (key, (label, meaning)) in zip(columns, _MEASURES.items(), strict=True):
        value = report.get(key)
        column.metric(label, percent(value) if key in _SHARES else number(value), help=meaning, border=True)
    masked = report.get("n_masked") or {}
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in masked.items())
    st.caption(
        f"The report scored {report.get('n_tokens', 0):,} tokens, split {str(report.get('split')).replace('_', '-')}; "
        f"left out by the mask: {left_out or 'none'}."
    )


def _curves(sae: SaeRun) -> None:
    lines = read_metrics(sae.sae_dir / "metrics.jsonl")
    if len(lines) < 2:
        st.caption("No training curve: metrics.jsonl holds fewer than two points.")
        return
    for column, (key, (name, is_share)) in zip(st.columns(3), _CURVES.items(), strict=True):
        points = [(line["tokens"], line[key]) for line in lines if _is_finite(line, key) and _is_finite(line, "tokens")]
        if not points:
            continue
        tokens, values = zip(*points, strict=True)
        column.html(charts.training_curve(tokens, values, name, is_share))


def _is_finite(line: dict[str, Any], key: str) -> bool:
    return isinstance(line.get(key), int | float) and math.isfinite(line[key])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Up to 1,000 evenly spread points of a metrics file, first and last included; a truncated line is skipped."""
    if not path.exists():
        return []
    points = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            points.append(json.loads(line))
    points = [point for point in points if isinstance(point, dict)]
    n = min(len(points), _MAX_POINTS)
    return [points[round(i * (len(points) - 1) / max(n - 1, 1))] for i in range(n)]


def _settings(config: dict[str, Any]) -> None:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    with st.expander("Settings in sae.json"):
        items = "".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(json.dumps(value, ensure_ascii=False))}</dd>"
            for key, value in flat.items()
        )
        st.html(
            f'<dl class="sa-cfg">{items}</dl>' if items else "sae.json is not written yet: training is still running."
        )
