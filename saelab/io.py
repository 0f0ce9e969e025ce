"""saelab's own SAE format: `sae.json` (every setting that affects a number), `sae.safetensors`, `golden.safetensors`.

`golden.safetensors` holds 64 inputs with their feature activations and reconstructions; loading recomputes them and refuses
a folder whose numbers have changed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors, atomic_write_json, read_json, tensors_hash
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE, VARIANTS
from saelab.saes.inputs import HALF
from saelab.saes.provenance import Provenance

FORMAT_VERSION = 2  # version 1 had no "golden_hash"
GOLDEN_ROWS = 64
_TINY_ACT = 1e-3


def save_sae(sae: SAE, folder: str | Path, *, golden_inputs: Float[Tensor, "n *sources d_in"] | None = None) -> Path:
    """Write an SAE. `golden_inputs` are raw activations (at least one row) from which the golden ones are taken.

    The default is random inputs around the SAE's centre. `sae.json` is written last, so a folder that has it is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if golden_inputs is None:
        noise = torch.randn(4 * GOLDEN_ROWS, *sae.center.shape, generator=torch.Generator().manual_seed(0))
        golden_inputs = noise / sae.scale.cpu()[..., None] + sae.center.cpu()
    tensors = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    atomic_save_safetensors(folder / "sae.safetensors", tensors)
    golden = _golden(sae, golden_inputs)
    atomic_save_safetensors(folder / "golden.safetensors", golden)
    atomic_write_json(folder / "sae.json", describe(sae) | {"golden_hash": tensors_hash(golden)})
    sae.provenance = dataclasses.replace(sae.provenance, folder=folder)
    return folder


def describe(sae: SAE) -> dict[str, Any]:
    """The content of `sae.json`, without the hash of the golden file."""
    return {
        "format_version": FORMAT_VERSION,
        "variant": sae.variant,
        "d_in": sae.d_in,
        **sae.shape,
        "d_sae": sae.d_sae,
        "config": dataclasses.asdict(sae.config),
        "dtype": str(dtype_of(sae)).removeprefix("torch."),
        "unit_norm_decoder": sae.unit_norm,
        "rule": sae.selection_rule,
        "sae_hash": sae.hash,
        "training": sae.provenance.trained,
        **sae.provenance.origin,
    }


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE folder. Raises `SaelabError` if a file is missing or altered, or golden numbers are not reproduced."""
    folder = Path(folder)
    if not (folder / "sae.json").exists():
        raise SaelabError(
            f"{folder} holds no sae.json, so no finished SAE: train one there, or pass an SAE's folder (RUN/sae)."
        )
    meta = _read_meta(folder / "sae.json")
    try:
        variant = VARIANTS[meta["variant"]]
        shape = {name: meta[name] for name in variant.extra_dims}
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in meta["config"].items()}
        sae = variant(variant.Config(**config), meta["d_in"], **shape)
        sae.to(getattr(torch, meta.get("dtype", "float32")))
        trained, weights_hash = meta["training"], meta["sae_hash"]
        golden_hash = meta["golden_hash"] if meta["format_version"] > 1 else None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise SaelabError(f"{folder / 'sae.json'} was altered ({error!r}): {_AGAIN}.") from error
    tensors, golden = _read(folder / "sae.safetensors"), _read(folder / "golden.safetensors")
    try:
        sae.load_state_dict(tensors)
    except RuntimeError as error:
        raise SaelabError(f"{folder / 'sae.safetensors'} does not fit its sae.json: {error}") from error
    for name, expected, now in (("sae", weights_hash, sae.hash), ("golden", golden_hash, tensors_hash(golden))):
        if expected is not None and expected != now:
            raise SaelabError(
                f"{folder / name}.safetensors was altered: hash {now[:12]}; sae.json says {str(expected)[:12]}: {_AGAIN}."
            )
    origin = {key: value for key, value in meta.items() if key not in _OWN}
    try:
        sae.provenance = Provenance(origin, trained, golden["train_documents"], folder)
        _check_golden(sae.eval(), golden, folder)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise SaelabError(f"{folder / 'golden.safetensors'} was altered ({error!r}): {_AGAIN}.") from error
    return sae.to(device)


def dtype_of(sae: SAE) -> torch.dtype:
    """The dtype of the weights."""
    return next(sae.parameters()).dtype


_AGAIN = "restore it from a backup, or train the SAE again"
_OWN = {"format_version", "variant", "d_in", "d_sae", "config", "dtype", "unit_norm_decoder", "rule", "sae_hash"}
_OWN |= {"golden_hash", "training"}.union(*(variant.extra_dims for variant in VARIANTS.values()))


def _read_meta(path: Path) -> dict[str, Any]:
    """`sae.json`, checked for a supported version and variant."""
    meta = read_json(path)
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if not isinstance(version, int):
        raise SaelabError(f"{path} does not describe a saelab SAE (format_version={version!r}): {_AGAIN}.")
    if version > FORMAT_VERSION:
        raise SaelabError(
            f"{path.parent} has format version {version}; this saelab reads up to {FORMAT_VERSION}: update saelab."
        )
    if meta.get("variant") not in list(VARIANTS):
        raise SaelabError(
            f"{path.parent} has variant {meta.get('variant')!r}; this saelab supports {', '.join(VARIANTS)}."
        )
    return meta


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SaelabError(f"{path} is missing, truncated or altered ({error}).") from error


@torch.no_grad()
def _golden(sae: SAE, inputs: Tensor) -> dict[str, Tensor]:
    """Golden inputs and outputs; rows whose selected features survive random changes of 1e-3 of their size come first."""
    inputs = inputs.to(sae.W_enc.device).float()[: 16 * GOLDEN_ROWS]
    size = (inputs - sae.center).norm(dim=-1, keepdim=True) / sae.d_in**0.5
    generator = torch.Generator().manual_seed(0)
    feature_acts = sae.encode(inputs)
    stable = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    for _ in range(4):
        noise = torch.randn(inputs.shape, generator=generator).to(inputs.device)
        stable &= _same_features(feature_acts, sae.encode(inputs + 1e-3 * size * noise))
    order = torch.cat([stable.nonzero().squeeze(1), (~stable).nonzero().squeeze(1)])[:GOLDEN_ROWS]
    chosen = inputs[order]
    x_hat, feature_acts = sae(chosen)
    return {
        "x": chosen,
        "values": feature_acts.values,
        "features": feature_acts.features,
        "offsets": feature_acts.offsets,
        "x_hat": x_hat,
        "train_documents": sae.provenance.train_documents,
    }


def _same_features(one: SparseActs, other: SparseActs) -> Bool[Tensor, " rows"]:
    """Whether the same features fire on each row, in chunks of rows: dense tensors of all would be large."""
    chunks = torch.arange(one.batch, device=one.features.device).split(GOLDEN_ROWS)
    dense = ((feature_acts.select_rows(rows).to_dense() != 0 for feature_acts in (one, other)) for rows in chunks)
    return torch.cat([(a == b).all(1) for a, b in dense])


@torch.no_grad()
def _check_golden(sae: SAE, golden: dict[str, Tensor], folder: Path) -> None:
    """Compare feature activations and reconstructions; activations below 1e-3 of the row's largest may appear or vanish."""
    rtol = 2e-2 if dtype_of(sae) in HALF else 1e-4
    expected = SparseActs(golden["values"], golden["features"], golden["offsets"], sae.d_sae).to_dense()
    got = sae(golden["x"])
    feature_acts = got.acts.to_dense()
    largest = expected.abs().amax(1, keepdim=True)
    moved = ((feature_acts != 0) != (expected != 0)) & (
        torch.maximum(feature_acts.abs(), expected.abs()) > _TINY_ACT * largest
    )
    if bool(moved.any()):
        raise SaelabError(
            f"{folder}: golden inputs activate different features than when saved ({int(moved.sum())} differ)."
        )
    for name, now, then in (
        ("feature activations", feature_acts, expected),
        ("reconstructions", got.x_hat, golden["x_hat"]),
    ):
        error, size = float((now - then).norm()), float(then.norm())
        if not error <= rtol * max(size, 1e-30):
            raise SaelabError(
                f"{folder}: golden {name} are not reproduced: their difference has norm {error:.3g}, the saved ones {size:.3g}."
            )
