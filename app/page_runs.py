"""Runs page: one table of all SAEs of the run, their curves over each other, FVU against L0, and more of the chosen one."""

from __future__ import annotations

import html
import json
from typing import Any

import streamlit as st

from saelab.app import as_python, markdown, run_curves, run_table, state
from saelab.app.curves import scatter
from saelab.features.render import model_label, number, percent
from saelab.hints.next_commands import command
from saelab.run_folder import summary
from saelab.run_folder.summary import Summary
from saelab.runs import SaeRun

_MEASURES = {
    "fvu": ("FVU", "Fraction of variance unexplained on held-out tokens; lower is better."),
    "fvu_unmasked": (
        "FVU unmasked",
        "The same without the mask: a few rows of huge norm dominate it, for better or worse.",
    ),
    "l0": ("L0", "Mean number of features that fire on a token."),
    "dead_fraction": ("Dead", "Share of features that never fired on the held-out tokens."),
    "ce_loss_recovered": (
        "CE recovered",
        "Share of the cross-entropy loss added by zero ablation that the SAE's reconstruction recovers; 100 % is perfect.",
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
    found, chosen = state.saes(), state.chosen_sae()
    _offer(found)
    rows = {sae.name: summary(sae) for sae in found}
    for fault in dict.fromkeys(fault for row in rows.values() for fault in row.faults):
        st.warning(markdown.plain(fault))
    if len(found) > 1:
        run_table.show(list(rows.values()), chosen.name)
    scored = [row for row in rows.values() if row.fvu is not None and row.l0 is not None]
    if len(scored) > 1:
        with st.container(key="sa-charts"):
            left, right = st.columns([3, 2], gap="large", wrap=False)
        with left:
            run_curves.show(found)
        with right:
            _scatter(scored)
    else:
        run_curves.show(found)
    _one(chosen, rows[chosen.name])


def _offer(found: list[SaeRun]) -> None:
    reports = [str(sae.report_path) for sae in found if sae.report_path.exists()]
    as_python.offer(
        "import json",
        "from pathlib import Path",
        "",
        f"reports = [json.loads(Path(path).read_text(encoding='utf-8')) for path in {reports}]",
        "for report in reports:",
        "    print(report['hook_name'], report['fvu'], report['l0'], report['ce_loss_recovered'])",
    )


def _scatter(rows: list[Summary]) -> None:
    st.subheader("FVU against L0", divider="gray")
    said = "; ".join(f"{row.name}: FVU {row.fvu:.3f} at L0 {row.l0:.1f}" for row in rows)
    st.vega_lite_chart(scatter(rows), alt=f"FVU against L0: {said}", key="scatter")
    st.caption("Both on held-out text; lower left is better.")


def _one(sae: SaeRun, row: Summary) -> None:
    st.subheader(markdown.plain(sae.name), divider="gray")
    parts = [row.variant, f"{row.d_sae:,} features" if row.d_sae else None]
    parts += [run_table.setting(row.sparsity) if row.sparsity else None, row.hook_name, model_label(row.model or "")]
    known = " \u00b7 ".join(part for part in parts if part)
    st.html(f'<p class="sa-sub">{html.escape(known)}</p>')
    if row.report:
        _measures(row.report)
    else:
        st.info(
            f"No report yet. `{command('eval', sae.sae_dir)}` measures this SAE on held-out text.",
            icon=":material/info:",
        )
    _settings(row.config)


def _measures(report: dict[str, Any]) -> None:
    with st.container(horizontal=True):  # which wraps
        for key, (label, meaning) in _MEASURES.items():
            shown = percent(report.get(key)) if key in _SHARES else number(report.get(key))
            st.metric(label, shown, help=meaning, border=True, width=170)
    masked = report.get("n_masked") or {}
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in masked.items())
    st.caption(
        f"The report scored {report.get('n_tokens', 0):,} tokens, split {str(report.get('split')).replace('_', '-')}; "
        f"left out by the mask: {left_out or 'none'}."
    )


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
