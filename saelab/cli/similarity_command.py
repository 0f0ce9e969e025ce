"""`saelab similarity`: which layers are alike, within a model and between models, by the tokens in their ITDA dictionaries."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from saelab.cli.answers import AsJson, answering
from saelab.errors import SaelabError
from saelab.hints.next_commands import check_has_cache, one_hook_training

Runs = Annotated[
    Positional[tuple[Path, ...]],
    arg(metavar="RUN [RUN ...]", help="Run folders, one per model, or folders of itda SAEs."),
]


def similarity(runs: Runs, as_json: AsJson = False) -> None:
    """Compare the itda dictionaries of RUNs, layer by layer, by the tokens that they consist of. With several RUNs of as many
    layers, two or more, also count how often the most similar layer of another RUN is the one of the same number."""
    from saelab.evaluation.similarity import full, jaccard_matrix, layer_matching_accuracy, model_jaccard

    if not runs:
        raise ValueError("name a RUN with itda SAEs, or several: saelab similarity runs/a runs/b")
    with answering(as_json) as answer:
        models = [_layers(run) for run in runs]
        flat = [sae for layers in models for sae in layers]
        if len(flat) < 2:
            raise ValueError(f"{runs[0]} holds one itda SAE: name another RUN, or train one on another hook.")
        if len(models) > 1:
            _refuse_twice(models)
        owner = [number for number, layers in enumerate(models) for _ in layers]
        matrix, stopped = jaccard_matrix(flat, flat), full(flat)
        equal = len(models) > 1 and len({len(layers) for layers in models}) == 1 < len(models[0])
        data: dict[str, Any] = {
            "saes": [
                {"run": run, **_about(sae), "full": sae in stopped}
                for run, layers in zip(runs, models, strict=True)
                for sae in layers
            ],
            "jaccard": matrix,
            "model_jaccard": [[model_jaccard(one, other) for other in models] for one in models],
            "layer_matching_accuracy": layer_matching_accuracy(models) if equal else None,
        }
        answer(data, _table(data["saes"], owner, matrix), *_between(data), *_stopped(stopped))


def _layers(run: Path) -> list[Any]:
    """The itda SAEs of a RUN in the order of their hooks, numbers by value."""
    from saelab.io import load_sae
    from saelab.runs import find_saes
    from saelab.saes import ITDASAE

    found = [sae for each in find_saes(run) if isinstance(sae := load_sae(each.sae_dir), ITDASAE)]
    if not found:
        raise ValueError(
            f"{run} holds no itda SAE: {_how_to_train(run.parent if (run / 'sae.json').exists() else run)}"
        )
    return sorted(found, key=lambda sae: [int(part) if part.isdigit() else part for part in _parts(sae)])


def _how_to_train(run: Path) -> str:
    try:
        check_has_cache(run)
        return one_hook_training(run, "itda", ("--d-sae", 4096, "--n-tokens", "250_000"))
    except (SaelabError, ValueError) as error:
        return str(error)


def _parts(sae: Any) -> list[str]:
    return re.split(r"(\d+)", sae.provenance.origin.get("hook_name") or str(sae.provenance.folder))


def _about(sae: Any) -> dict[str, Any]:
    return {
        "sae": sae.provenance.folder.name,
        "hook_name": sae.provenance.origin.get("hook_name"),
        "n_atoms": int(sae.n_atoms),
        "n_rows": int(sae.n_rows),
    }


def _refuse_twice(models: list[list[Any]]) -> None:
    """Raise `ValueError` for two SAEs of one hook in a RUN: with several RUNs each SAE stands for a layer."""
    for layers in models:
        for hook, saes in _by_hook(layers).items():
            if hook is not None and len(saes) > 1:
                names = " and ".join(str(sae.provenance.folder) for sae in saes)
                raise ValueError(
                    f"{names} are of one hook, {hook}, but each itda SAE of a RUN stands for a layer: move one into another RUN, "
                    "or compare single SAEs by naming their folders instead of RUNs."
                )


def _by_hook(layers: list[Any]) -> dict[str | None, list[Any]]:
    found: dict[str | None, list[Any]] = {}
    for sae in layers:
        found.setdefault(sae.provenance.origin.get("hook_name"), []).append(sae)
    return found


def _stopped(full: list[Any]) -> list[str]:
    """A line on the dictionaries that are full."""
    if not full:
        return []
    names = ", ".join(f"{sae.provenance.folder} (d_sae={sae.d_sae})" for sae in full)
    return [
        f"Full, so that the Jaccard depends on where they stopped growing: {names}. Train them with a larger --d-sae or --tau."
    ]


def _table(saes: list[dict[str, Any]], owner: list[int], matrix: Any) -> Any:
    """Each SAE with the one most like it, of another RUN if there are several."""
    from rich.table import Table

    hooks = [(str(sae["run"]), sae["hook_name"]) for sae in saes]
    names = [_named(sae, hooks.count(hook) > 1) for sae, hook in zip(saes, hooks, strict=True)]
    table = Table("RUN", "hook", "atoms", "most similar", "Jaccard")
    for i, sae in enumerate(saes):
        others = [j for j in range(len(saes)) if (owner[j] != owner[i] if owner[-1] else j != i)]
        best = max(others, key=lambda j, i=i: float(matrix[i, j]))
        atoms = f"{sae['n_atoms']:,}{' (full)' if sae['full'] else ''}"
        table.add_row(
            str(sae["run"]), names[i], atoms, f"{saes[best]['run']} {names[best]}", f"{float(matrix[i, best]):.3f}"
        )
    return table


def _named(sae: dict[str, Any], several: bool) -> str:
    """An SAE by its hook, and by its own name where it records none or several are of one hook."""
    hook = sae["hook_name"]
    return str(sae["sae"]) if hook is None else f"{hook} ({sae['sae']})" if several else str(hook)


def _between(data: dict[str, Any]) -> list[str]:
    """What several RUNs have in common."""
    models, accuracy = data["model_jaccard"], data["layer_matching_accuracy"]
    lines = [f"Jaccard of the first two RUNs, all layers together: {models[0][1]:.3f}"] if len(models) > 1 else []
    return [*lines, *([f"Layer matching accuracy: {accuracy:.3f}"] if accuracy is not None else [])]


SIMILARITY: dict[str, tuple[Callable[..., None], str]] = {
    "similarity": (similarity, "saelab similarity runs/small runs/large\nsaelab similarity runs/mlp --json"),
}
