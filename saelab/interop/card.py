"""The model card of an SAE on the hub: what it reads, how it was trained, what it measures, and the code that loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from saelab.saes import SAE

_MEASURES = (
    ("fvu", "fraction of variance unexplained"),
    ("l0", "features per token"),
    ("ce_loss_recovered", "cross-entropy recovered (against zero ablation)"),
    ("dead_fraction", "features that never fired"),
    ("n_tokens", "tokens"),
)


def model_card(
    sae: SAE,
    repo: str,
    report: Mapping[str, Any] | None,
    *,
    license: str | None,
    picture: str | None,
    for_sae_lens: bool,
) -> str:
    """README.md with its YAML header. `report` is the content of `report.json`, `picture` a file beside the card."""
    model = (sae.provenance.origin.get("model") or {}).get("name")
    header = {"library_name": "saelab", "tags": ["sparse-autoencoder", "interpretability", sae.variant]}
    header |= {"base_model": model} if model and "/" in model else {}
    header |= {"license": license} if license else {}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", "", f"# {repo}", ""]
    lines += [f"A sparse autoencoder ({sae.variant}) with {sae.d_sae:,} features, trained with saelab.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in _facts(sae, license).items()), ""]
    if report is not None:
        lines += ["## Report", "", f"On {_cell(report.get('texts', 'texts'))}, split {report.get('split')}.", ""]
        lines += ["| measure | value |", "|---|---|", *_rows(report), ""]
    if picture is not None:
        lines += [f"![FVU against L0 of SAEs trained side by side]({picture})", ""]
    lines += ["## Load it", "", *_code("import saelab", "", f'sae = saelab.load_sae("{repo}")')]
    if for_sae_lens:
        imports = "from huggingface_hub import snapshot_download", "from sae_lens import SAE"
        lines += [
            "With SAELens:",
            "",
            *_code(*imports, "", f'sae = SAE.load_from_disk(snapshot_download("{repo}") + "/sae_lens")'),
        ]
    return "\n".join(lines)


def _facts(sae: SAE, license: str | None) -> dict[str, str]:
    origin = sae.provenance.origin
    hooks = ", ".join(origin.get("hook_names") or [str(origin.get("hook_name") or "not recorded")])
    if origin.get("hook_name_out"):
        hooks += f" -> {', '.join(origin.get('hook_names_out') or [origin['hook_name_out']])}"
    return {
        "language model": str((origin.get("model") or {}).get("name") or "not recorded"),
        "hook": hooks,
        "width": str(sae.d_in),
        "selection": sae.selection_rule,
        "texts": _texts(origin),
        "trained": _trained(sae),
        "licence": license or "not stated",
    }


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


def _rows(report: Mapping[str, Any]) -> list[str]:
    shown = [(said, report.get(key)) for key, said in _MEASURES]
    return [f"| {said} | {value:,.4g} |" for said, value in shown if isinstance(value, int | float)]


def _texts(origin: Mapping[str, Any]) -> str:
    texts = origin.get("texts") or {}
    return str(texts.get("source") or "not recorded") + (f", split {texts['split']}" if texts.get("split") else "")


def _trained(sae: SAE) -> str:
    trained = sae.provenance.trained
    if trained.get("imported"):
        return f"imported from {sae.provenance.origin.get('imported', {}).get('source', 'another library')}"
    return f"{trained['n_tokens']:,} tokens" if isinstance(trained.get("n_tokens"), int) else "see sae.json"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
