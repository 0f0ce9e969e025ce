"""`DataSource`: training rows, wherever they come from (`data.py`).

One stream gives the rows of every site that any SAE needs; each SAE takes its own batch from it (`View`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.saes import SAE
from saelab.saes.hooks_used import HooksUsed

LEAST_VARIANCE = 5e-7
"""Of the mean square: below it rows are the same but for the rounding of float32."""
Rows = Mapping[str, Tensor]
"""Rows by site; row i is the same token in each."""
Stream = Callable[[Sequence[str], int, int, int], Iterator[Rows]]
"""(sites, batch_size, seed, start_step) -> batches from that step on."""


class Moments(NamedTuple):
    """What the normalisation of a site is made from."""

    mean: Float[Tensor, "*sources d"]
    mean_square: Float[Tensor, "*sources"]
    """Mean squared norm of a row (fp64)."""


class View(NamedTuple):
    """What one SAE takes from the data, and what it must remember of it."""

    hooks: HooksUsed
    d_in: int
    shape: dict[str, int]
    """The sizes that its class names in `extra_dims`."""
    moments: tuple[Tensor, ...]
    """Arguments of `set_normalization`."""
    fingerprint: str
    origin: dict[str, Any]
    rows: str
    """SHA-256 of all that decided the rows of a cache; "" of other data, whose fingerprint says it."""

    @property
    def width(self) -> int:
        """Numbers in a row that is read, all sources together."""
        return self.d_in * self.shape.get("n_sources", 1)

    @property
    def width_out(self) -> int:
        """Numbers in a row that is rebuilt."""
        return self.shape.get("d_out", self.width)


@dataclass
class DataSource:
    """Training rows of one site or several."""

    moments: Callable[[str], Moments]
    """Of a site."""
    batches: Stream
    choose: Callable[[type[SAE], Any], HooksUsed]
    """(variant, config) -> the hooks of its SAE."""
    identity: Callable[[HooksUsed], tuple[str, dict[str, Any]]]
    """Sites -> fingerprint of their rows, and the origin that `sae.json` keeps."""
    n_rows: int | None = None
    """How many different rows there are; None where nobody knows."""
    documents: Callable[[], Tensor] = lambda: torch.zeros(0, dtype=torch.int64)
    """Ids of the documents that were read up to now."""
    rows: str = ""
    """SHA-256 of the config of a cache."""
    held_bytes: int = 0
    """Memory that reading takes beside the batches."""
    kept_out: Callable[[Sequence[str]], Rows] | None = None
    """The rows of these sites that no batch holds; None where none are kept out."""

    def view(self, variant: type[SAE], config: Any) -> View:
        """What an SAE of this config takes. Raises `ValueError` where the data does not fit it."""
        hooks = self.choose(variant, config)
        x, y = self._moments(hooks.inputs), self._moments(hooks.outputs)
        n_sources = max(one.mean.shape[0] if one.mean.ndim == 2 else 1 for one in (x, y))
        sizes = {"n_sources": n_sources, "d_out": y.mean.shape[-1]}
        shape = {name: sizes[name] for name in variant.extra_dims}
        if n_sources > 1 and "n_sources" not in shape:
            raise ValueError(
                f"A tensor to train on is (n, d_in) for {variant.variant}, got {n_sources} sources a row: only a "
                "crosscoder reads (n, n_sources, d_in)."
            )
        moments = (*x, *y) if hooks.inputs != hooks.outputs else tuple(x)
        return View(hooks, x.mean.shape[-1], shape, moments, *self.identity(hooks), self.rows)

    def _moments(self, names: Sequence[str]) -> Moments:
        """Of one site; several of equal width make one with an axis for the sources."""
        several = [_that_vary(name, self.moments(name)) for name in names]
        if len(several) == 1:
            return several[0]
        widths = {name: one.mean.shape[-1] for name, one in zip(names, several, strict=True)}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"The sources of a crosscoder have one width, these have {widths}: choose other hook_names."
            )
        return Moments(*(torch.stack(parts) for parts in zip(*several, strict=True)))


def _that_vary(name: str, moments: Moments) -> Moments:
    """Raises `ValueError` where all rows are the same: there is nothing to learn, and no scale to learn it in."""
    variance = moments.mean_square - moments.mean.double().square().sum(-1)
    same = (variance <= LEAST_VARIANCE * moments.mean_square).flatten().nonzero().flatten().tolist()
    if same:
        where = f" of source {same[0]}" if moments.mean.ndim == 2 else ""
        spread, size = (float(of.flatten()[same[0]]) for of in (variance, moments.mean_square))
        kind = "all zero" if not size else "all the same, or nearly, beside their mean"
        raise ValueError(
            f"The activations {name!r}{where} to train on are {kind} (variance {spread:.1e} in a mean square of {size:.1e}): "
            "look at what was harvested, take their mean off, or leave this hook out."
        )
    return moments
