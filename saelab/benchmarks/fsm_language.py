"""The language of a random finite-state machine (after TokFSM, Tamkin et al. 2023): a text is BOS and a random walk, with
each state written as a zero-padded decimal number; every edge out of a state is equally likely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.validation import check_integer

BOS = 10
D_VOCAB = 11


@dataclass(frozen=True, eq=False)
class Machine:
    """A finite-state machine; `edges (n_states, n_edges)` are the successors of each state."""

    edges: Int[Tensor, "n_states n_edges"]

    @classmethod
    def random(cls, n_states: int = 50, n_edges: int = 10, seed: int = 0) -> Machine:
        """Draw distinct successors for each state, uniformly. Raises `ValueError` for more edges than states."""
        check_integer("n_states", n_states, 2)
        check_integer("n_edges", n_edges, 1, n_states)
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(n_states, generator=generator)[:n_edges] for _ in range(n_states)]
        return cls(torch.stack(rows))

    @property
    def n_states(self) -> int:
        return len(self.edges)

    @property
    def n_digits(self) -> int:
        return len(str(self.n_states - 1))

    @property
    def allowed(self) -> Bool[Tensor, "n_states n_states"]:
        """Whether there is an edge from the row's state to the column's state."""
        return torch.zeros(self.n_states, self.n_states, dtype=torch.bool).scatter(1, self.edges, True)

    def walks(self, n: int, length: int, seed: int) -> Int[Tensor, "n length"]:
        """Random walks of `length` states from uniform starts."""
        generator = torch.Generator().manual_seed(seed)
        states = [torch.randint(self.n_states, (n,), generator=generator)]
        for _ in range(length - 1):
            choice = torch.randint(self.edges.shape[1], (n,), generator=generator)
            states.append(self.edges[states[-1], choice])
        return torch.stack(states, 1)

    def write(self, walks: Int[Tensor, "n length"]) -> Int[Tensor, "n tokens"]:
        """Token ids: BOS and the digits, `1 + n_digits * length` in all; the last digit of step i is at `n_digits * (i + 1)`."""
        powers = 10 ** torch.arange(self.n_digits - 1, -1, -1)
        digits = (walks[..., None] // powers % 10).flatten(1)
        return torch.cat([digits.new_full((len(walks), 1), BOS), digits], 1)

    def read(self, digits: Int[Tensor, "n n_digits"]) -> Int[Tensor, " n"]:
        """States from their digits; -1 for digits that are not a state."""
        powers = 10 ** torch.arange(self.n_digits - 1, -1, -1)
        states = (digits * powers).sum(1)
        return states.where((digits < 10).all(1) & (states < self.n_states), -1)

    def next_digit(self) -> Float[Tensor, "n_states vocab"]:
        """The true next-token distribution after each state, over the first digit of its successors."""
        first = self.edges // 10 ** (self.n_digits - 1)
        counts = torch.zeros(self.n_states, D_VOCAB).scatter_add(1, first, torch.ones(first.shape))
        return counts / self.edges.shape[1]
