"""Affine maps of every coordinate, `T(x) = w x + b`, at several hooks: edits that can be applied in part, and their file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.edits.direction import finite
from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors, atomic_write_json, read_json, tensors_hash

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class AffineEdit:
    """An edit for `lm.steer`: `x' = x + strength ((w - 1) x + b)`, 0 for none and 1 for all of the map.

    Position 0 and padding are not edited, and coordinates with w = 1 and b = 0 stay bit-identical.
    """

    hook_name: str
    weight: Float[Tensor, " d_in"]
    """w - 1."""
    bias: Float[Tensor, " d_in"]
    """b, in raw units of the activations."""
    strength: float = 1.0

    @property
    def d_in(self) -> int:
        """Width of the activations it edits."""
        return self.weight.numel()

    def __repr__(self) -> str:
        changed = int(((self.weight != 0) | (self.bias != 0)).sum())
        return f"<affine map of {changed} of {self.d_in} coordinates at {self.hook_name}: strength {self.strength:g}>"

    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """The edited activations, computed in fp32, in the dtype of `x`; `x` itself at strength 0 or for the identity."""
        weight, bias = self.weight.to(x.device), self.bias.to(x.device)
        is_learned = weight.requires_grad or bias.requires_grad
        if self.strength == 0 or not (is_learned or bool(weight.any() or bias.any())):
            return x
        wide = x.float()
        edited = (wide + self.strength * (weight * wide + bias)).to(x.dtype)
        return torch.where((positions > 0)[..., None], edited, x)


@dataclass(frozen=True, eq=False)
class LinEAS:
    """Maps learned by `lineas`, one at each hook: `lm.steer(*maps.edits())`, or `lm.steer(*maps * 0.5)` for half of them."""

    maps: tuple[AffineEdit, ...]
    """In forward order, at strength 1."""
    losses: tuple[float, ...]
    """Before each step, on the texts of that step."""
    loss_start: float
    loss_end: float
    """Without the maps and with them, on all texts; in units of the variance of each coordinate, summed over all of them."""
    model: str
    """Name of the model that they were learned on."""
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return (
            f"LinEAS(maps at {len(self.maps)} hooks of {self.model}, loss {self.loss_start:.4g} -> {self.loss_end:.4g})"
        )

    def edits(self, strength: float = 1.0) -> tuple[AffineEdit, ...]:
        """Edits for `lm.steer`: 0 changes nothing, 1 is what was learned. Raises `ValueError` for what is not finite."""
        return tuple(replace(one, strength=finite(strength)) for one in self.maps)

    def __mul__(self, strength: float) -> tuple[AffineEdit, ...]:
        """As `edits`."""
        return self.edits(strength)

    __rmul__ = __mul__

    @property
    def sparsity(self) -> float:
        """Share of the coordinates that no map changes."""
        changed = sum(int(((one.weight != 0) | (one.bias != 0)).sum()) for one in self.maps)
        return 1 - changed / sum(one.d_in for one in self.maps)

    def save(self, folder: str | Path) -> Path:
        """Write `lineas.safetensors` and, last, `lineas.json`."""
        folder, tensors = Path(folder), _tensors(self.maps)
        atomic_save_safetensors(folder / "lineas.safetensors", tensors)
        meta = {
            "format_version": FORMAT_VERSION,
            "hook_names": [one.hook_name for one in self.maps],
            "model": self.model,
            "hash": tensors_hash(tensors),
            "loss_start": self.loss_start,
            "loss_end": self.loss_end,
            "losses": list(self.losses),
            "settings": self.settings,
        }
        atomic_write_json(folder / "lineas.json", meta)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> LinEAS:
        """Read what `save` wrote. Raises `SaelabError` for a folder that holds none, or whose files were altered."""
        folder = Path(folder)
        meta = read_json(folder / "lineas.json")
        try:
            if meta["format_version"] > FORMAT_VERSION:
                raise SaelabError(f"{folder} has format version {meta['format_version']}; update saelab to read it.")
            tensors = load_file(folder / "lineas.safetensors")
            maps = tuple(AffineEdit(name, tensors[f"{name}/w-1"], tensors[f"{name}/b"]) for name in meta["hook_names"])
            if tensors_hash(tensors) != meta["hash"]:
                raise SaelabError(f"{folder / 'lineas.safetensors'} was altered: its hash is not that of lineas.json.")
            ends = float(meta["loss_start"]), float(meta["loss_end"])
            return cls(maps, tuple(map(float, meta["losses"])), *ends, str(meta["model"]), dict(meta["settings"]))
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise SaelabError(f"{folder} holds no complete LinEAS maps ({error!r}): learn them again.") from error


def _tensors(maps: tuple[AffineEdit, ...]) -> dict[str, Tensor]:
    named = {f"{one.hook_name}/w-1": one.weight for one in maps} | {f"{one.hook_name}/b": one.bias for one in maps}
    return {name: tensor.detach().float().cpu() for name, tensor in named.items()}
