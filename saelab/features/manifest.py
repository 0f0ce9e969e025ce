"""Reads and checks the manifest of a feature store, and tells whether it keeps both ends of signed features apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab.errors import SaelabError, StoreError
from saelab.features import schema
from saelab.files import read_json
from saelab.hints.next_commands import command

COLLECT_AGAIN = "Collect it again with saelab.collect_features(..., renew=True) or `saelab features RUN --renew`."
SIGNS_MIXED = (
    "this store was collected by an earlier saelab that mixed the two ends of signed features, so it has no steering unit, "
    "maximum or examples for either end. Remove its folder and collect it again with saelab.collect_features(...) or "
    "`saelab features RUN`; or steer in unit='raw'."
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the store in `folder`. Raises `StoreError` when it is missing, not readable by this version, or when a
    file it lists is missing or truncated."""
    path = folder / schema.MANIFEST
    if not path.exists():
        raise StoreError(
            f"{folder} holds no feature store ({schema.MANIFEST} is missing). Collect one: "
            f"`{command('features', _sae_of(folder))}`, or saelab.collect_features(...) in Python."
        )
    try:
        manifest = read_json(path)
        if manifest["format"] != schema.FORMAT:
            raise StoreError(f"{path} says format {manifest['format']!r}, expected {schema.FORMAT!r}.")
        if manifest["version"] > schema.VERSION:
            raise StoreError(
                f"{folder} has store version {manifest['version']}, but this saelab reads up to {schema.VERSION}: "
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
        raise StoreError(f"{path} is not a feature manifest ({error}). {COLLECT_AGAIN}") from error
    return manifest


def _sae_of(folder: Path) -> Path | str:
    """The SAE whose features would be in this folder, or a snapshot of one; where neither is there, what to put for it."""
    folders = (
        folder.with_name(folder.name.replace("features", "sae", 1)),
        folder.with_name(folder.name.removeprefix("features-")),
    )
    return next((one for one in folders if (one / "sae.json").exists()), "RUN")


def signed_features(manifest: dict[str, Any], config: dict[str, Any] | None) -> bool | None:
    """Whether any feature activation was negative; None where values of both signs were mixed.

    Stores older than the "signed" key took quantiles and examples of the signed value, which is right only for an SAE whose
    feature activations are never negative. `config` is the SAE's, if known.
    """
    if "signed" in manifest:
        return manifest["signed"]
    variant = manifest["sae"].get("variant")
    if variant == "matching_pursuit":
        return False if config is not None and not config.get("signed") else None
    return None if variant == "abs_topk" else False
