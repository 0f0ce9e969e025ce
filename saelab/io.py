"""saelab's own SAE format: `sae.json` (every switch that changes a number), `sae.safetensors`, `golden.safetensors`.

`golden.safetensors` holds 64 inputs with their codes and reconstructions; loading computes them again and refuses a
folder whose numbers have changed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors, atomic_write_json, read_json
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE, VARIANTS

FORMAT_VERSION = 1
GOLDEN_ROWS = 64
_TINY_CODE = 1e-3


def save_sae(sae: SAE, folder: str | Path, golden_inputs: Float[Tensor, "n d_in"] | None = None) -> Path:
    """Write an SAE. `golden_inputs` are raw activations (at least one row) from which the golden ones are taken.

    Without them random inputs around the SAE's centre serve. `sae.json` is written last: a folder with it is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if golden_inputs is None:
        noise = torch.randn(4 * GOLDEN_ROWS, sae.d_in, generator=torch.Generator().manual_seed(0))
        golden_inputs = noise / sae.scale.cpu() + sae.center.cpu()
    tensors = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    atomic_save_safetensors(folder / "sae.safetensors", tensors)
    atomic_save_safetensors(folder / "golden.safetensors", _golden(sae, golden_inputs))
    atomic_write_json(folder / "sae.json", describe(sae))
    sae.folder = folder
    return folder


def describe(sae: SAE) -> dict[str, Any]:
    """The content of `sae.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "variant": sae.variant,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "config": dataclasses.asdict(sae.config),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "unit_norm_decoder": sae.unit_norm,
        "sae_hash": sae.hash,
        "training": sae.trained,
        **sae.origin,
    }


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE folder. Raises `SaelabError` when a file is missing or altered, or the golden numbers do not come back."""
    folder = Path(folder)
    if not (folder / "sae.json").exists():
        raise SaelabError(
            f"{folder} holds no sae.json, so no finished SAE: train one there, or give its folder (RUN/sae)."
        )
    meta = read_json(folder / "sae.json")
    if meta.get("format_version", 0) > FORMAT_VERSION:
        raise SaelabError(
            f"{folder} has format version {meta['format_version']}, this saelab reads up to {FORMAT_VERSION}: update saelab."
        )
    if meta.get("variant") not in VARIANTS:
        raise SaelabError(f"{folder} is of variant {meta.get('variant')!r}; this saelab knows {', '.join(VARIANTS)}.")
    cls = VARIANTS[meta["variant"]]
    sae = cls(cls.Config(**meta["config"]), meta["d_in"])
    tensors, golden = _read(folder / "sae.safetensors"), _read(folder / "golden.safetensors")
    try:
        sae.load_state_dict(tensors)
    except RuntimeError as error:
        raise SaelabError(f"{folder / 'sae.safetensors'} does not fit its sae.json: {error}") from error
    sae.trained = meta.pop("training")
    own = {"format_version", "variant", "d_in", "d_sae", "config", "dtype", "unit_norm_decoder", "sae_hash"}
    sae.origin = {key: value for key, value in meta.items() if key not in own}
    sae.train_documents = golden["train_documents"]
    sae.folder = folder
    if sae.hash != meta["sae_hash"]:
        raise SaelabError(
            f"{folder / 'sae.safetensors'} was altered: hash {sae.hash[:12]}, sae.json says {meta['sae_hash'][:12]}."
        )
    _check_golden(sae.eval(), golden, folder)
    return sae.to(device)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SaelabError(f"{path} is missing, truncated or altered ({error}).") from error


@torch.no_grad()
def _golden(sae: SAE, inputs: Tensor) -> dict[str, Tensor]:
    """Inputs whose selection has a gap: it survives random changes of 1e-3 of their size. Such rows come first."""
    inputs = inputs.to(sae.W_enc.device).float()[: 16 * GOLDEN_ROWS]
    size = (inputs - sae.center).norm(dim=1, keepdim=True) / sae.d_in**0.5
    generator = torch.Generator().manual_seed(0)
    fires = sae.encode(inputs).to_dense() != 0
    stable = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    for _ in range(4):
        noise = torch.randn(inputs.shape, generator=generator).to(inputs.device)
        stable &= ((sae.encode(inputs + 1e-3 * size * noise).to_dense() != 0) == fires).all(1)
    order = torch.cat([stable.nonzero().squeeze(1), (~stable).nonzero().squeeze(1)])[:GOLDEN_ROWS]
    chosen = inputs[order]
    acts = sae.encode(chosen)
    return {
        "x": chosen,
        "values": acts.values,
        "features": acts.features,
        "offsets": acts.offsets,
        "x_hat": sae.decode(acts),
        "train_documents": sae.train_documents,
    }


@torch.no_grad()
def _check_golden(sae: SAE, golden: dict[str, Tensor], folder: Path) -> None:
    """Compare codes and reconstructions; codes under 1e-3 of their row's largest may come and go."""
    rtol = 2e-2 if sae.W_enc.dtype == torch.bfloat16 else 1e-4
    expected = SparseActs(golden["values"], golden["features"], golden["offsets"], sae.d_sae).to_dense()
    got = sae(golden["x"])
    codes = got.acts.to_dense()
    largest = expected.abs().amax(1, keepdim=True)
    moved = ((codes != 0) != (expected != 0)) & (torch.maximum(codes.abs(), expected.abs()) > _TINY_CODE * largest)
    if bool(moved.any()):
        raise SaelabError(f"{folder}: golden inputs fire other features than when saved ({int(moved.sum())} differ).")
    for name, now, then in (("codes", codes, expected), ("reconstruction", got.x_hat, golden["x_hat"])):
        error, size = float((now - then).norm()), float(then.norm())
        if not error <= rtol * max(size, 1e-30):
            raise SaelabError(
                f"{folder}: golden {name} do not come back: norm of the difference {error:.3g}, of the saved {size:.3g}."
            )
