"""`Ranks`: the processes that share each batch, and the collectives they call. A single process communicates nothing.

Every result is bit-identical on all ranks, and so is everything that they compute from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saelab.errors import TrainingError


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group; without a group, this process alone.

    The communicating methods are collectives: all ranks must make the same calls in the same order, with tensors of the
    same shape (except for `all_gather`). Raises `TrainingError` if another rank is gone.
    """

    group: Any = None
    """A `torch.distributed` group."""
    n_rows: int | None = None
    """Rows of the batch that they share, of which each has a contiguous slice; see `sharing`."""

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def sharing(self, n_rows: int) -> Ranks:
        """The same ranks, sharing a batch of `n_rows` rows."""
        return replace(self, n_rows=n_rows)

    @property
    def local_rows(self) -> slice:
        """This rank's rows of the batch. Sizes differ by at most one row."""
        assert self.n_rows is not None
        return slice(self.n_rows * self.rank // self.size, self.n_rows * (self.rank + 1) // self.size)

    def global_batch_size(self, n: int) -> int:
        """Rows of the batch on all ranks, of which `n` are on this one."""
        if self.group is None:
            return n
        assert self.n_rows is not None and n == self.local_rows.stop - self.local_rows.start
        return self.n_rows

    def all_reduce_sum(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        """Elementwise sum over the ranks; a new tensor."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def all_reduce_sum_(self, x: Num[Tensor, "*shape"]) -> None:
        """The same in place; `x` is contiguous."""
        if self.group is not None:
            self._ask(lambda: dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group))

    def all_reduce_min(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        """Elementwise minimum over the ranks."""
        return self._reduced(x, dist.ReduceOp.MIN)

    def all_reduce_any(self, x: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Elementwise logical or over the ranks."""
        return x if self.group is None else self._reduced(x.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def any_rank(self, flag: bool, device: torch.device | None = None) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.group is None else bool(self.all_reduce_any(torch.tensor(flag, device=device)))

    def barrier(self, device: torch.device | None = None) -> None:
        """Wait until all ranks have reached this call."""
        self.any_rank(False, device)

    def all_reduce_total(self, n: int, device: torch.device | None = None) -> int:
        """Sum of a number over the ranks."""
        return n if self.group is None else int(self.all_reduce_sum(torch.tensor(n, device=device)))

    def all_gather(self, x: Shaped[Tensor, "n ..."]) -> list[Shaped[Tensor, "_ ..."]]:
        """The tensors of all ranks, in rank order; their first dimensions may differ."""
        if self.group is None:
            return [x]
        sizes = torch.stack(self.all_gather_same_shape(torch.tensor(len(x), device=x.device))).tolist()
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return [one[:n] for one, n in zip(self.all_gather_same_shape(padded), sizes, strict=True)]

    def each(self, x: Shaped[Tensor, "*shape"]) -> Iterator[Shaped[Tensor, "*shape"]]:
        """The tensors of all ranks, in rank order, one at a time; each is valid until the next is requested."""
        sent = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rank in range(self.size):
            sent.copy_(x)
            if self.group is not None:
                self._ask(lambda rank=rank: dist.broadcast(sent, group=self.group, group_src=rank))
            yield sent

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor with that of rank 0."""
        for tensor in tensors if self.group is not None else ():
            sent = tensor.detach().contiguous()
            self._ask(lambda sent=sent: dist.broadcast(sent, group=self.group, group_src=0))
            tensor.detach().copy_(sent)

    def all_gather_same_shape(self, x: Shaped[Tensor, "*shape"]) -> list[Shaped[Tensor, "*shape"]]:
        """The tensors of all ranks, in rank order; all have the same shape, so this is one collective."""
        if self.group is None:
            return [x]
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        self._ask(lambda: dist.all_gather(gathered, x, group=self.group))
        return gathered

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        if self.group is None:
            return x
        result = x.detach().clone(memory_format=torch.contiguous_format)
        self._ask(lambda: dist.all_reduce(result, operation, group=self.group))
        return result

    def _ask(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:  # the peer's socket closed, or the timeout expired
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # gloo appends more
            raise TrainingError(
                f"Rank {self.rank} of {self.size} lost contact with another rank, which was killed, stopped or is hanging "
                f"({reason}). See the message of the rank that ended first; the same call resumes from the last "
                "checkpoint."
            ) from error


SINGLE_PROCESS = Ranks()
"""One process alone."""


class GatherRows(Function):
    """The rows of all ranks, in rank order; the gradient of a row is the sum of what every rank computes for it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return torch.cat(ranks.all_gather(local))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.all_reduce_sum(grads[0])[ctx.ranks.local_rows], None


def gather_rows(local: Float[Tensor, "n d"], ranks: Ranks) -> Float[Tensor, "_ d"]:
    """The rows of all ranks that share a batch, in rank order; differentiable."""
    return local if ranks.size == 1 else GatherRows.apply(local, ranks)  # pyright: ignore[reportReturnType]


class GradientSum:
    """Call it after the backward pass: `p.grad` of each parameter becomes the sum over the ranks.

    The sums share one buffer, which is reused at every step. A parameter without a gradient on any rank stays without
    one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self.parameters, self.ranks = list(parameters), ranks
        self._flat: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        if self.ranks.size == 1 or not self.parameters:
            return
        given = [p.grad is not None for p in self.parameters]
        sizes = [p.numel() for p in self.parameters]
        if self._flat is None:
            self._flat = self.parameters[0].new_empty(sum(sizes) + len(sizes))
        *gradients, flags = self._flat.split([*sizes, len(sizes)])
        sums = [one.as_strided(p.shape, p.stride()) for one, p in zip(gradients, self.parameters, strict=True)]
        for total, p in zip(sums, self.parameters, strict=True):
            total.zero_() if p.grad is None else total.copy_(p.grad)
        flags.copy_(torch.tensor(given))
        self.ranks.all_reduce_sum_(self._flat)
        for total, p, anywhere in zip(sums, self.parameters, flags.tolist(), strict=True):
            p.grad = total if anywhere else None


@torch.no_grad()
def global_variance(squares: Float[Tensor, ""], mean: Float[Tensor, " d"], n: int, ranks: Ranks) -> Float[Tensor, ""]:
    """`sum |x - mean(x)|^2` over all rows, from this rank's own sum about its own mean of `n` rows.

    Parts are merged as in Chan, Golub & LeVeque (1983), which avoids cancellation.
    """
    local = torch.cat([squares.view(1), squares.new_tensor([float(n)]), mean])
    gathered = torch.stack(ranks.all_gather(local[None])).squeeze(1)  # (ranks, d + 2)
    counts, means = gathered[:, 1], gathered[:, 2:]
    mean = (counts[:, None] * means).sum(0) / counts.sum()
    return gathered[:, 0].sum() + (counts * (means - mean).square().sum(1)).sum()
