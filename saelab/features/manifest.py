"""The manifest of a feature store: read, checked, and asked whether features of either sign were told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab.errors import SaelabError, StoreError
from saelab.features import schema
from saelab.files import read_json

COLLECT_AGAIN = "Collect it anew with saelab.collect_features(...) or `saelab features RUN`."
SIGNS_MIXED = (
    "this store was collected before the two ends of signed features were told apart, so it has no unit, maximum or examples "
    "of either end. Remove its folder and collect it anew with saelab.collect_features(...) or `saelab features RUN`; or "
    "steer in unit='raw'."
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the store in `folder`, whose files are there in full size. Raises `StoreError` otherwise."""
    path = folder / schema.MANIFEST
    if not path.exists():
        raise StoreError(f"{folder} holds no feature store ({schema.MANIFEST} is missing). {COLLECT_AGAIN}")
    try:
        manifest = read_json(path)
        if manifest["format"] != schema.FORMAT:
            raise StoreError(f"{path} says format {manifest['format']!r}, expected {schema.FORMAT!r}.")
        if manifest["version"] > schema.VERSION:
            raise StoreError(
                f"{folder} has store version {manifest['version']}, this saelab reads up to {schema.VERSION}: "
                "update saelab."
            )
        for name, entry in manifest["files"].items():
            if not (folder / name).exists() or (folder / name).stat().st_size != entry["bytes"]:
                raise StoreError(
                    f"{folder / name} is missing or truncated ({entry['bytes']:,} bytes expected). {COLLECT_AGAIN}"
                )
        _ = manifest["sae"]["d_sae"], manifest["sae"]["hash"], manifest["sae"]["folder"], manifest["model"]["name"]
        _ = manifest["n_tokens"], manifest["hook_name"], manifest["split"], manifest["files"][schema.DATABASE]["sha256"]
    except StoreError:
        raise
    except (SaelabError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is no feature manifest ({error}). {COLLECT_AGAIN}") from error
    return manifest


def signed_features(manifest: dict[str, Any], config: dict[str, Any] | None) -> bool | None:
    """Whether features were negative anywhere; None where values of both signs were thrown together.

    Stores from before there was that key took quantiles and examples of the signed value, which is right only for an SAE
    whose feature activations are never negative. `config` is the SAE's, where it is known.
    """
    if "signed" in manifest:
        return manifest["signed"]
    variant = manifest["sae"].get("variant")
    if variant == "matching_pursuit":
        return False if config is not None and not config.get("signed") else None
    return None if variant == "abs_topk" else False
