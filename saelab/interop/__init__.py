"""Loads and saves SAEs: saelab's own format (`saelab.io`) and those of other libraries, one file each (`formats.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab import io
from saelab.errors import SaelabError
from saelab.files import writing
from saelab.saes.trained_hooks import check_is_sae

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from saelab.interop.source import Source
    from saelab.saes import SAE

__all__ = ["load_sae", "save_sae"]


def load_sae(
    source: str | Path,
    *,
    format: str | None = None,
    assume: Mapping[str, Any] | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> SAE:
    """Load an SAE: a RUN, an SAE folder or file of saelab or another library, or a hub id with a path behind it
    ("google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium").

    An existing local path wins; the hub is asked only otherwise, at `revision` (a branch, tag or commit). The format is found
    out, or `format` names it (docs/released_saes.md). Where the files leave a meaning open, the SAE records what was assumed
    (`sae.provenance.origin["imported"]["assumed"]`); `assume={"k": 64}` settles it, or overrides what they say.

    Raises `SaelabError` for files that are missing, damaged, of no known format or without a needed number, `ValueError` for
    an unknown `format` or key of `assume`.
    """
    path = Path(source)
    if path.is_file() and path.name in ("sae.json", "sae.safetensors") and (path.parent / "sae.json").exists():
        path = path.parent
    if path.is_dir() and format in (None, "saelab") and (folder := _saelab_folder(path)) is not None:
        if format is None and (others := [name for name, mark in _MARKS.items() if (folder / mark).exists()][1:]):
            raise SaelabError(
                f"{folder} holds SAEs in several formats (saelab, {', '.join(others)}): say which, format='saelab'."
            )
        if assume:
            raise ValueError(f"{folder} is in saelab's own format, whose sae.json says everything: omit assume.")
        return io.load_sae(folder, device or "cpu")
    return _load_other(source, format, assume, revision).to(device or "cpu")


def _load_other(source: str | Path, format: str | None, assume: Mapping[str, Any] | None, revision: str | None) -> SAE:
    """Files of another library, or of any on the hub."""
    from saelab.interop.formats import FORMATS
    from saelab.interop.hub import HubSource, parse
    from saelab.interop.reading import read
    from saelab.interop.source import LocalSource

    path = Path(source)
    if format is not None and format not in ("saelab", *FORMATS):
        raise ValueError(f"format={format!r} is unknown; saelab reads saelab, {', '.join(FORMATS)}.")
    if format == "saelab" and path.exists():
        raise SaelabError(f"{path} holds no sae.json, so no finished SAE of saelab.")
    if path.exists():
        return read(LocalSource(path), format, assume)
    if (where := parse(str(source))) is None:
        raise SaelabError(f"{source} does not exist, and is no id of the hub (org/repo/path).")
    remote = HubSource(where, revision)
    if remote.has("sae.json") and format in (None, "saelab"):
        return _saelab_from_hub(remote)
    return read(remote, format, assume)


def _saelab_from_hub(remote: Source) -> SAE:
    """An SAE in saelab's own format on the hub; its `origin` gets the commit."""
    folders = {remote.fetch(name).parent for name in ("sae.json", "sae.safetensors", "golden.safetensors")}
    sae = io.load_sae(folders.pop())
    origin = {**sae.provenance.origin, "hub": remote.record}
    sae.provenance = dataclasses.replace(sae.provenance, origin=origin)
    return sae


def _saelab_folder(path: Path) -> Path | None:
    """The SAE folder of saelab's format that `path` is, or holds as a RUN; None if there is none."""
    if (path / "sae.json").exists():
        return path
    found = sorted(entry.parent for entry in path.glob("sae*/sae.json"))
    if len(found) > 1:
        raise SaelabError(f"{path} holds {len(found)} SAEs: name one of {', '.join(map(str, found))}.")
    return found[0] if found else None


def save_sae(
    sae: SAE,
    folder: str | Path,
    *,
    format: str = "saelab",
    golden_inputs: Float[Tensor, "n *sources d_in"] | None = None,
) -> Path:
    """Save an SAE to `folder`, which `load_sae` and every command read; returns the folder.

    `golden_inputs` are raw activations (at least one row, in the units the SAE was trained on): 64 of them are stored with
    their feature activations, which loading checks. By default they are random inputs around the SAE's centre.

    `format` may name another library's: "sae_lens", "sparsify", "dictionary_learning" or "gemma_scope_2"; centre and scale are
    folded into the weights. Raises `ValueError` for an unknown format, `SaelabError` for what a format cannot hold.
    """
    check_is_sae(sae, "save_sae")
    if format == "saelab":
        _refuse_other_files(Path(folder), format)
        return io.save_sae(sae, folder, golden_inputs=golden_inputs)
    from saelab.interop.blueprint import check_numbers
    from saelab.interop.describing import blueprint_of
    from saelab.interop.formats import FORMATS

    writers = {name: one.save for name, one in FORMATS.items() if one.save is not None}
    if not isinstance(format, str) or format not in writers:
        raise ValueError(f"format={format!r} is unknown; saelab writes {', '.join(map(repr, ('saelab', *writers)))}.")
    if golden_inputs is not None:
        raise ValueError(f"golden_inputs are stored in saelab's own format alone; omit them with format={format!r}.")
    _refuse_other_files(Path(folder), format)
    plan = blueprint_of(sae)
    check_numbers(plan)
    with writing(folder):
        writers[format](plan, Path(folder))
    return Path(folder)


_MARKS = {
    "saelab": "sae.json", "sae_lens": "sae_weights.safetensors", "sparsify": "cfg.json", "dictionary_learning": "ae.pt",
    "gemma_scope_2": "params.safetensors",
}  # fmt: skip
"""A file that each format writes; sparsify's config has the name of SAELens'."""


def _refuse_other_files(folder: Path, format: str) -> None:
    """Raise `SaelabError` if the folder holds an SAE in another format: its files would mix, or be overwritten."""
    here = [name for name, mark in _MARKS.items() if (folder / mark).exists()]
    if "sae_lens" in here and "sparsify" in here:
        here.remove("sparsify")
    if others := [name for name in here if name != format]:
        raise SaelabError(f"{folder} already holds an SAE in the format {others[0]}: choose an empty or new folder.")
