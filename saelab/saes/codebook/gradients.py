"""Gradients of a codebook inside a model (Tamkin et al. 2023, "Codebook Features"). With `q` the mean of the codes of input
`a`, the model continues with q; the gradient g of its loss goes straight through to `a`, and in addition:

    base         the kept codes get g, like the rows of an embedding
    aeloss       as base, plus the codebook loss mean_t |q - a|^2 on the codes
    fullaeloss   as aeloss, plus the commitment loss beta mean_t |a - q|^2 on the input
    vqvae        the codes get the codebook loss alone, the input as in fullaeloss

(In the authors' code the commitment loss is a sum over tokens, so its weight grows with the batch; here both are means.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from saelab.losses import squared_error


def rotation_trick(a: Float[Tensor, "n d"], q: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """`(|q| / |a|) R a`, with R the rotation from a to q, held constant (Fifty et al. 2024): equal to q; the gradient
    reaching a has the same angle to a as g has to q."""
    a_hat, q_hat = normalize(a.detach(), dim=1), normalize(q.detach(), dim=1)
    middle = normalize(a_hat + q_hat, dim=1)  # 0 where q points against a
    turned = a - 2 * middle * (middle * a).sum(1, keepdim=True) + 2 * q_hat * (a_hat * a).sum(1, keepdim=True)
    tiny = torch.finfo(a.dtype).tiny
    return turned * (q.detach().norm(dim=1, keepdim=True) / a.detach().norm(dim=1, keepdim=True).clamp_min(tiny))


def straight_through(
    a: Float[Tensor, "n d"], q: Float[Tensor, "n d"], gradient: str, rotation: bool = False
) -> Float[Tensor, "n d"]:
    """q, bit for bit; its gradient goes to `a`, and to the codes in q unless `gradient` is "vqvae"."""
    way = rotation_trick(a, q) if rotation else a
    return (q.detach() if gradient == "vqvae" else q) + (way - way.detach())


def codebook_loss(
    a: Float[Tensor, "n d"], q: Float[Tensor, "n d"], gradient: str, beta: float, n_tokens: int
) -> Float[Tensor, ""]:
    """Codebook loss and commitment loss, to be added to the model's loss."""
    loss = a.new_zeros(())
    if gradient != "base":
        loss = loss + squared_error(a.detach(), q)
    if gradient in ("fullaeloss", "vqvae"):
        loss = loss + beta * squared_error(a, q.detach())
    return loss / max(n_tokens, 1)
