"""The language models that a feature store was collected with: their names, and whether those given are the same. Torch
is imported when models are compared."""

from __future__ import annotations

from typing import Any


def model_names(store: Any) -> list[str]:
    """The names to load them by, in order: one, or all that a crosscoder reads."""
    several = store.sae.provenance.origin.get("models") if _labels(store) else None
    return [one["name"] for one in several.values()] if several else [store.manifest["model"]["name"]]


def all_models(store: Any, lm: Any) -> Any:
    """The model or models that read a text for the store's SAE, as one. Raises `ValueError` for other weights, and for one model
    or another order where the SAE reads several."""
    from saelab.models.multi_model import together

    manifest = store.manifest
    wanted = manifest["request"]["model_hash"] if (labels := _labels(store)) else manifest["model"]["hash"]
    if (lm := together(lm)).hash == wanted:
        return lm
    if labels:
        raise ValueError(
            f"The store was collected with {' + '.join(labels)}: give these models as a list in this order, not {lm.name}."
        )
    raise ValueError(f"The store was collected with {manifest['model']['name']}: {lm.name} has other weights.")


def steered_model(store: Any, lm: Any) -> Any:
    """The model at whose hook the store's features are steered: the last that a crosscoder reads. Raises `ValueError` for other
    weights."""
    from saelab.models.multi_model import locate, together

    lm, _ = locate(together(lm), store.hook_name)
    if lm.hash != store.manifest["model"]["hash"]:
        raise ValueError(
            f"The store was collected with {store.manifest['model']['name']}: {lm.name} has other weights."
        )
    return lm


def _labels(store: Any) -> list[str]:
    """Of several models; [] for one."""
    return list(dict.fromkeys(name.partition("/")[0] for name in store.manifest["sites"]["reads"] if "/" in name))
