"""`Ranks`: the processes that share each batch, and the few things they ask each other. Alone, nothing is sent.

Every answer is the same on all ranks, bit for bit, so that what they make of it stays the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Num, Shaped
from torch import Tensor

from saelab.errors import TrainingError


@dataclass(frozen=True)
class Ranks:
    """Processes of one group; without a group there is only this one.

    Each method is a collective call: all ranks make the same calls in the same order, with tensors of one shape (but
    for `gather`). Raises `TrainingError` when another rank is gone.
    """

    group: Any = None
    """A `torch.distributed` group."""
    n_rows: int | None = None
    """Rows of the batch that they share, each a contiguous part; see `sharing`."""

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sharing(self, n_rows: int) -> Ranks:
        """The same processes with a batch of `n_rows` rows to share."""
        return replace(self, n_rows=n_rows)

    @property
    def own(self) -> slice:
        """The rows of this rank. Shares differ by a row at most."""
        assert self.n_rows is not None
        return slice(self.n_rows * self.rank // self.size, self.n_rows * (self.rank + 1) // self.size)

    def whole(self, n: int) -> int:
        """Rows of the whole batch, of which `n` are here."""
        if self.group is None:
            return n
        assert self.n_rows is not None and n == self.own.stop - self.own.start
        return self.n_rows

    def sum(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        """Elementwise sum over the ranks; a new tensor."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def sum_(self, x: Num[Tensor, "*shape"]) -> None:
        """The same in place; `x` is contiguous."""
        if self.group is not None:
            self._ask(lambda: dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group))

    def least(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        """Elementwise minimum over the ranks."""
        return self._reduced(x, dist.ReduceOp.MIN)

    def any(self, x: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """True where it is on any rank."""
        return x if self.group is None else self._reduced(x.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def agree(self, flag: bool, device: torch.device | None = None) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.group is None else bool(self.any(torch.tensor(flag, device=device)))

    def total(self, n: int, device: torch.device | None = None) -> int:
        """The sum of a number over the ranks."""
        return n if self.group is None else int(self.sum(torch.tensor(n, device=device)))

    def gather(self, x: Shaped[Tensor, "n ..."]) -> list[Shaped[Tensor, "_ ..."]]:
        """The tensors of all ranks in order; their first axes may differ."""
        if self.group is None:
            return [x]
        sizes = torch.stack(self.gather_alike(torch.tensor(len(x), device=x.device))).tolist()
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return [part[:n] for part, n in zip(self.gather_alike(padded), sizes, strict=True)]

    def each(self, x: Shaped[Tensor, "*shape"]) -> Iterator[Shaped[Tensor, "*shape"]]:
        """The tensors of all ranks in order, one at a time; each is valid until the next."""
        sent = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rank in range(self.size):
            sent.copy_(x)
            if self.group is not None:
                self._ask(lambda rank=rank: dist.broadcast(sent, group=self.group, group_src=rank))
            yield sent

    def take_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor with that of rank 0."""
        for tensor in tensors if self.group is not None else ():
            sent = tensor.detach().contiguous()
            self._ask(lambda sent=sent: dist.broadcast(sent, group=self.group, group_src=0))
            tensor.detach().copy_(sent)

    def gather_alike(self, x: Shaped[Tensor, "*shape"]) -> list[Shaped[Tensor, "*shape"]]:
        """The tensors of all ranks in order, all of one shape: one collective."""
        if self.group is None:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._ask(lambda: dist.all_gather(parts, x, group=self.group))
        return parts

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        if self.group is None:
            return x
        whole = x.detach().clone(memory_format=torch.contiguous_format)
        self._ask(lambda: dist.all_reduce(whole, operation, group=self.group))
        return whole

    def _ask(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:  # the peer's socket closed, or the time is over
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # gloo goes on
            raise TrainingError(
                f"Rank {self.rank} of {self.size} waits in vain for another one, which was killed, stopped or hangs "
                f"({reason}). The message of the rank that ended first tells why; the same call goes on from the last "
                "checkpoint."
            ) from error


ALONE = Ranks()
"""One process."""
