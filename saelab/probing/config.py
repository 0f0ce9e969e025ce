"""What is measured, besides the sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from saelab.probing.regimes import Regime
from saelab.validation import check_fields, check_integer


@dataclass(frozen=True)
class ProbeConfig:
    """The sizes of a probing run."""

    ks: tuple[int, ...] = (1, 16, 128)
    """Features of the k-sparse probes."""
    n_train: int = 256
    """Most texts to train on, half of them of either label; validation takes its share of them."""
    n_test: int = 256
    """Most texts to test on, likewise."""
    n_splits: int = 3
    """Splits of every set; from 2 on they say how much of a difference is luck of the draw."""
    max_tokens: int = 128
    """Of a longer text the last ones are read."""
    few: tuple[int, ...] = (8, 32)
    """Training texts in the regime of few examples."""
    imbalance: tuple[float, ...] = (0.05, 0.2)
    """Shares of "yes" among the training texts under class imbalance."""
    noise: tuple[float, ...] = (0.1, 0.3)
    """Shares of training labels that are flipped under label noise."""
    n_hard_sets: int = 5
    """Sets, spread evenly over those of the run, that these three regimes are measured on."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("n_train", 32), ("n_test", 16), ("n_splits", 1), ("max_tokens", 2), ("n_hard_sets", 0)):
            check_integer(name, getattr(self, name), least)
        for name, least in (("ks", 1), ("few", 4)):
            for value in getattr(self, name):
                check_integer(name, value, least)
        if len(set(self.ks)) < len(self.ks) or not self.ks:
            raise ValueError(f"ks={self.ks} must be different numbers of features, at least one.")
        for name, below in (("imbalance", 1.0), ("noise", 0.5)):
            if any(not 0 < value < below for value in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be shares between 0 and {below:g}.")
        if any(value > self.n_train for value in self.few):
            raise ValueError(f"few={self.few} must not exceed n_train={self.n_train}.")

    def hard_regimes(self) -> Iterator[Regime]:
        """All regimes but the standard one."""
        yield from (Regime("few", value) for value in self.few)
        yield from (Regime("imbalance", value) for value in self.imbalance)
        yield from (Regime("noise", value) for value in self.noise)
