"""`saelab similarity`: which layers are alike, within a model and between models, by the tokens in their ITDA dictionaries."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from saelab.cli.answers import AsJson, answering

Runs = Annotated[
    Positional[tuple[Path, ...]],
    arg(metavar="RUN [RUN ...]", help="Run folders, one per model, or folders of itda SAEs."),
]


def similarity(runs: Runs, as_json: AsJson = False) -> None:
    """Compare the itda dictionaries of RUNs, layer by layer, by the tokens that they consist of. With several RUNs of as many
    layers also count how often the most similar layer of another RUN is the one of the same number."""
    from saelab.evaluation.similarity import jaccard_matrix, layer_matching_accuracy, model_jaccard

    if not runs:
        raise ValueError("name a RUN with itda SAEs, or several: saelab similarity runs/a runs/b")
    with answering(as_json) as answer:
        models = [_layers(run) for run in runs]
        flat = [sae for layers in models for sae in layers]
        if len(flat) < 2:
            raise ValueError(f"{runs[0]} holds one itda SAE: name another RUN, or train one on another hook.")
        owner = [number for number, layers in enumerate(models) for _ in layers]
        matrix = jaccard_matrix(flat, flat)
        equal = len(models) > 1 and len({len(layers) for layers in models}) == 1
        data: dict[str, Any] = {
            "saes": [{"run": run, **_about(sae)} for run, layers in zip(runs, models, strict=True) for sae in layers],
            "jaccard": matrix,
            "model_jaccard": [[model_jaccard(one, other) for other in models] for one in models],
            "layer_matching_accuracy": layer_matching_accuracy(models) if equal else None,
        }
        answer(data, _table(data["saes"], owner, matrix), *_between(data))


def _layers(run: Path) -> list[Any]:
    """The itda SAEs of a RUN in the order of their hooks, numbers by value."""
    from saelab.io import load_sae
    from saelab.runs import find_saes
    from saelab.saes import ITDASAE

    found = [sae for each in find_saes(run) if isinstance(sae := load_sae(each.sae_dir), ITDASAE)]
    if not found:
        raise ValueError(f"{run} holds no itda SAE: saelab train {run} --variant itda --d-sae 4096 --n-tokens 250_000")
    return sorted(found, key=lambda sae: [int(part) if part.isdigit() else part for part in _parts(sae)])


def _parts(sae: Any) -> list[str]:
    return re.split(r"(\d+)", sae.provenance.origin.get("hook_name") or str(sae.provenance.folder))


def _about(sae: Any) -> dict[str, Any]:
    return {
        "sae": sae.provenance.folder.name,
        "hook_name": sae.provenance.origin.get("hook_name"),
        "n_atoms": int(sae.n_atoms),
        "n_rows": int(sae.n_rows),
    }


def _table(saes: list[dict[str, Any]], owner: list[int], matrix: Any) -> Any:
    """Each SAE with the one most like it, of another RUN if there are several."""
    from rich.table import Table

    table = Table("RUN", "hook", "atoms", "most similar", "Jaccard")
    for i, sae in enumerate(saes):
        others = [j for j in range(len(saes)) if (owner[j] != owner[i] if owner[-1] else j != i)]
        best = max(others, key=lambda j, i=i: float(matrix[i, j]))
        shown = f"{saes[best]['run']} {saes[best]['hook_name'] or saes[best]['sae']}"
        hook = sae["hook_name"] or sae["sae"]
        table.add_row(str(sae["run"]), str(hook), f"{sae['n_atoms']:,}", shown, f"{float(matrix[i, best]):.3f}")
    return table


def _between(data: dict[str, Any]) -> list[str]:
    """What several RUNs have in common."""
    models, accuracy = data["model_jaccard"], data["layer_matching_accuracy"]
    lines = [f"Jaccard of the first two RUNs, all layers together: {models[0][1]:.3f}"] if len(models) > 1 else []
    return [*lines, *([f"Layer matching accuracy: {accuracy:.3f}"] if accuracy is not None else [])]


SIMILARITY: dict[str, tuple[Callable[..., None], str]] = {
    "similarity": (similarity, "saelab similarity runs/small runs/large\nsaelab similarity runs/mlp --json"),
}
