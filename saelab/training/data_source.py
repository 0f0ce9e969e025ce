"""`DataSource`: training rows, wherever they come from (`data.py`).

One stream yields the rows of every hook that any SAE needs; each SAE takes its own batch from it (`View`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activation_cache.columns import gradient_of
from saelab.saes import SAE
from saelab.saes.atoms import numbered
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.whitening import WHITEN

MIN_VARIANCE = 5e-7
"""As a fraction of the mean square: below this variance, rows differ by float32 rounding only."""
MOST_ROWS = 32_768
"""From which mean and covariance of control data are estimated."""
Rows = Mapping[str, Tensor]
"""Rows by hook name; row i is the same token in each."""
ROW_LABELS = "row labels"
"""The key in `Rows` of which token each row is, `(batch, 2)` (`saes/atoms.py`); there only if an SAE reads them."""
Stream = Callable[[Sequence[str], int, int, int], Iterator[Rows]]
"""(hook names, batch_size, seed, start_step) -> batches from that step on."""


class Moments(NamedTuple):
    """The statistics that the normalisation of a hook is computed from."""

    mean: Float[Tensor, "*sources d"]
    mean_square: Float[Tensor, "*sources"]
    """Mean squared norm of a row (fp64)."""


class View(NamedTuple):
    """What one SAE reads from the data, and what it records about it."""

    hooks: HooksUsed
    d_in: int
    shape: dict[str, int]
    """The sizes that its class names in `extra_dims`."""
    moments: tuple[Tensor, ...]
    """Arguments of `set_normalization`."""
    fingerprint: str
    origin: dict[str, Any]
    rows: str
    """SHA-256 of everything that determines the rows of a cache; "" for other data, where `fingerprint` covers it."""

    @property
    def width(self) -> int:
        """Width of an input row, all sources together."""
        return self.d_in * self.shape.get("n_sources", 1)

    @property
    def width_out(self) -> int:
        """Width of a target row."""
        return self.shape.get("d_out", self.d_in) * self.shape.get("n_sources", 1)


def row_numbers(batch_size: int, seed: int, start_step: int) -> Iterator[Tensor]:
    """Labels of rows that are only known by their numbers in the stream."""
    return (numbered(step * batch_size, batch_size) for step in count(start_step))


@dataclass
class DataSource:
    """Training rows of one or several hooks."""

    moments: Callable[[str], Moments]
    """Hook name -> its moments."""
    batches: Stream
    choose: Callable[[type[SAE], Any], HooksUsed]
    """(variant, config) -> the hooks of its SAE."""
    identity: Callable[[HooksUsed], tuple[str, dict[str, Any]]]
    """Hooks -> fingerprint of their rows, and the origin that `sae.json` records."""
    n_rows: int | None = None
    """Number of distinct rows; None if unknown."""
    documents: Callable[[], Tensor] = lambda: torch.zeros(0, dtype=torch.int64)
    """Ids of the documents read so far."""
    rows: str = ""
    """SHA-256 of the config of a cache; "" for other data."""
    held_bytes: int = 0
    """Bytes of memory that reading takes in addition to the batches."""
    pinned: bool = False
    """Whether batches are in pinned memory, each in its own."""
    labels: Callable[[int, int, int], Iterator[Tensor]] = row_numbers
    """(batch_size, seed, start_step) -> the labels of the rows of the same `batches`."""
    kept_out: Callable[[Sequence[str]], Rows] | None = None
    """Hook names -> the rows held out of all batches; None if none are."""
    sample: Callable[[str], Tensor] | None = None
    """Hook name -> rows to estimate its covariance from; None if they cannot be read before training."""
    control: DataSource | None = None
    """Rows to whiten by (`control.py`); None for those of the data itself."""
    start: SAE | None = None
    """The SAE whose weights, thresholds and normalisation training begins with; None: a new one."""
    make_step: Callable[[Any], Any] | None = None
    """What makes the steps (as `steps.make_step`, which is used if it is None)."""
    lacks_gradients: str | None = None
    """Why there is no gradient at each activation, and what to do; None if there is (`columns.gradient_of`)."""

    def view(self, variant: type[SAE], config: Any) -> View:
        """What an SAE of this config reads. Raises `ValueError` if the data does not fit it."""
        hooks = self._with_gradients(variant, self.choose(variant, config))
        x, y = self._moments(hooks.inputs), self._moments(hooks.outputs)
        n_sources = max(one.mean.shape[0] if one.mean.ndim == 2 else 1 for one in (x, y))
        sizes = {"n_sources": n_sources, "d_out": y.mean.shape[-1]}
        shape = {name: sizes[name] for name in variant.extra_dims}
        if n_sources > 1 and "n_sources" not in shape:
            raise ValueError(
                f"A tensor to train on must be (n, d_in) for {variant.variant}, got {n_sources} sources per row: only a "
                "crosscoder or a cross-layer transcoder reads (n, n_sources, d_in)."
            )
        moments = (*x, *y) if hooks.inputs != hooks.outputs else tuple(x)
        fingerprint, origin = self.identity(hooks)
        if self.control is not None and self.whitens(config):
            fingerprint += f" whitened by {self.control.identity(self.control.choose(variant, config))[0]}"
        return View(hooks, x.mean.shape[-1], shape, moments, fingerprint, origin, self.rows)

    @staticmethod
    def whitens(config: Any) -> bool:
        """Whether an SAE of this config whitens its input."""
        return config.normalize == WHITEN

    def _with_gradients(self, variant: type[SAE], hooks: HooksUsed) -> HooksUsed:
        """The hooks and, if the variant reads them, the gradients at its inputs. Raises `ValueError` if there are none."""
        if not variant.needs_gradients:
            return hooks
        if self.lacks_gradients is not None:
            raise ValueError(
                f"The variant {variant.variant} is trained with the gradient of the language model's loss at each activation, "
                f"and {self.lacks_gradients}."
            )
        return hooks._replace(gradients=tuple(map(gradient_of, hooks.inputs)))

    def _moments(self, names: Sequence[str]) -> Moments:
        """Moments of one hook; several hooks of equal width are stacked along a source axis."""
        several = [_that_vary(name, self.moments(name)) for name in names]
        if len(several) == 1:
            return several[0]
        widths = {name: one.mean.shape[-1] for name, one in zip(names, several, strict=True)}
        if len(set(widths.values())) > 1:
            raise ValueError(f"Sources must have the same width; these have {widths}: choose other hook_names.")
        return Moments(*(torch.stack(each) for each in zip(*several, strict=True)))


def _that_vary(name: str, moments: Moments) -> Moments:
    """Raises `ValueError` if all rows are the same: there is then nothing to learn, and no scale to normalise by."""
    variance = moments.mean_square - moments.mean.double().square().sum(-1)
    same = (variance <= MIN_VARIANCE * moments.mean_square).flatten().nonzero().flatten().tolist()
    if same:
        where = f" of source {same[0]}" if moments.mean.ndim == 2 else ""
        spread, size = (float(of.flatten()[same[0]]) for of in (variance, moments.mean_square))
        kind = "all zero" if not size else "all the same, or nearly so relative to their mean"
        raise ValueError(
            f"The activations {name!r}{where} to train on are {kind} (variance {spread:.1e}, mean square {size:.1e}): "
            "check what was harvested, subtract their mean, or leave this hook out."
        )
    return moments
