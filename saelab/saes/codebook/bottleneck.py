"""One codebook inside a model: a hook that replaces the activation by the mean of its codes, and keeps its last input."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from saelab.saes.codebook.quantizer import Codebook


class Bottleneck:
    """The codebook at one hook.

    After a forward pass `ids (tokens, kept)` are its codes; in eval mode `seen (tokens, d_in)` is its input, after the
    LayerNorm if there is one.
    """

    def __init__(self, hook_name: str, codebook: Codebook) -> None:
        self.hook_name, self.codebook = hook_name, codebook
        self.seen: Tensor | None = None
        self.ids: Tensor | None = None
        self.loss: Tensor | None = None

    def forget(self) -> None:
        """Called before a pass, so that what `seen`, `ids` and `loss` hold afterwards comes from that pass."""
        self.seen = self.ids = self.loss = None

    def __call__(self, x: Float[Tensor, "batch seq *d_in"]) -> Float[Tensor, "batch seq *d_in"]:
        """The hook; the codebook computes in its own dtype, independent of the model's."""
        rows = rearrange(x, "batch position ... -> (batch position) (...)").to(self.codebook.codes.dtype)
        out, feature_acts, self.loss = self.codebook.bottleneck(rows)
        self.ids = feature_acts.features.view(len(rows), -1)
        self.seen = None if self.codebook.training else self.codebook.norm(rows).detach()
        return out.to(x.dtype).view(x.shape)
