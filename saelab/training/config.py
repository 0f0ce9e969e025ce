"""`TrainConfig`: length, optimisation and checkpointing of a run. Settings of an SAE itself are in that SAE's config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from saelab.validation import MAY_BE_INFINITE, check_fields, check_integer


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The fields of `TrainConfig` that configure Adam and clipping, all keyword-only."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates for the averages of gradients and squared gradients (JumpReLU and Gated papers: 0 and 0.999)."""
    eps: float | None = None
    """Adam's epsilon; None means 1e-8, or less if batch_size times the width of the target exceeds 2**21."""
    clip_relative: float | None = None
    """Clip gradients at this multiple of the running mean of their norm, e.g. 3, in addition to clip_norm; None: no limit."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers from 0 to below 1, such as (0.9, 0.999).")
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        if self.eps is not None and not self.eps > 0:
            raise ValueError(
                f"eps={self.eps} must be a positive number, or None: Adam divides by it where nothing fires."
            )
        if self.clip_relative is not None and not self.clip_relative >= 1:
            raise ValueError(f"clip_relative={self.clip_relative} must be at least 1, or None for no limit.")


_NO_DIFFERENCE = ("keep_checkpoints", "feature_shards", "snapshot_every")
"""Fields of `TrainConfig` that may change when a run goes on: its result is the same."""


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """One training run; every SAE in it sees the same batches."""

    n_tokens: int
    """Training tokens (rows); the data is repeated as needed."""
    batch_size: int = 2048
    """Rows per optimiser step."""
    lr: float | None = None
    """Adam's peak learning rate; None: sqrt(4096 / d_sae) * 3e-3 (1e-3 for relu, gated, crosscoder, codebook)."""
    seed: int = 0
    """Seed of the initial weights and of the order of batches."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay_fraction: float = 0.2
    """Final fraction of the run, over which the learning rate falls linearly to 0."""
    clip_norm: float = field(default=1.0, metadata=MAY_BE_INFINITE)
    """Largest global gradient norm, after the decoder projection; float('inf') disables clipping."""
    dead_after_tokens: int | None = None
    """A feature that has not fired for this many tokens is dead; None: 400 * d_sae / L0, at most a twentieth of the run."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0 writes none. Ctrl-C writes one at any step."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept on disk, the newest ones."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    grad_accumulation: int = 1
    """Micro-batches that a batch is split into to save memory, processed one after another."""
    device: str | None = None
    """"cpu", "cuda", ...; None uses a GPU if there is one."""
    feature_shards: int = 1
    """Ranks over which the features of one SAE are sharded (topk, batch_topk); such groups of ranks share the rows."""
    snapshot_every: int | None = None
    """Steps between snapshots: the SAE as it then is, kept in its folder to watch features form; None keeps none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, smallest in (
            ("n_tokens", 1),
            ("batch_size", 1),
            ("log_every", 1),
            ("grad_accumulation", 1),
            ("keep_checkpoints", 1),
            ("feature_shards", 1),
            ("checkpoint_every", 0),
            ("warmup_steps", 0),
        ):
            check_integer(name, getattr(self, name), smallest)
        check_integer("seed", self.seed, 0, 2**32 - 1)
        for name, smallest in (("dead_after_tokens", 0), ("snapshot_every", 1)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), smallest)
        if self.n_tokens < self.batch_size:
            raise ValueError(
                f"n_tokens={self.n_tokens} is less than one batch of {self.batch_size}; raise n_tokens or lower batch_size."
            )
        if 1 in map(len, self.micro_batches):
            raise ValueError(
                f"batch_size={self.batch_size} with grad_accumulation={self.grad_accumulation} leaves a micro-batch of one row, "
                "whose FVU is undefined (one row has no variance): raise batch_size or lower grad_accumulation."
            )
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be a positive number, or None for the variant's own.")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} is a fraction of the run: use a value from 0 to 1.")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive; float('inf') turns clipping off.")

    @property
    def micro_batches(self) -> list[range]:
        """The rows of each micro-batch of a batch."""
        size = -(-self.batch_size // self.grad_accumulation)
        return [range(start, min(start + size, self.batch_size)) for start in range(0, self.batch_size, size)]

    @property
    def n_steps(self) -> int:
        """Whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_size

    @property
    def longest_dead_window(self) -> int:
        """Upper limit in tokens of the default dead window of any SAE (`dead_features.dead_window`)."""
        return self.n_tokens // 20

    def settings(self) -> dict[str, str]:
        """What determines the result, as recorded in `run.json` and `sae.json`: without the fields of `_NO_DIFFERENCE`.

        Fields added after the first version are omitted at their defaults, since the files of older runs lack them.
        """
        later = {field.name: field.default for field in fields(OptimizerConfig)}
        return {
            name: str(value)
            for name, value in asdict(self).items()
            if name not in _NO_DIFFERENCE and value != later.get(name, ...)
        }
