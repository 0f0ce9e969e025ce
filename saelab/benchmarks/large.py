"""`run_large`: how many features of a large dictionary die? The data are thousands of planted features with Zipf frequencies,
in superposition; the dead fraction of the dictionary is reported every million tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import normalize

from saelab.benchmarks.planted import FEATURES, HELD_OUT, SPREAD, TOKENS
from saelab.benchmarks.results import Row, open_rows
from saelab.benchmarks.synthetic import at_l0, check_variants
from saelab.evaluation.reconstruction import Reconstruction
from saelab.kernels.decode import decode
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE
from saelab.training import TrainConfig, train
from saelab.training.metrics_log import read_lines
from saelab.training.sae_run import device_of
from saelab.validation import check_at_least, check_fields

KEYS = ("variant", "tokens")
MILLION = 1_000_000
CHUNK = 8192
HELD_OUT_ROWS = 32 * CHUNK
FOUND = 0.9


@dataclass(frozen=True)
class LargeConfig:
    """Sizes of the data and of the SAEs; with the defaults, two variants take about an hour on 2 cores."""

    d_in: int = 256
    """Width of the data."""
    n_features: int = 8192
    """Planted features."""
    n_active: int = 24
    """Mean number of planted features that are active in a token."""
    d_sae: int = 16_384
    """Features of each SAE."""
    k: int = 32
    """Active features per token."""
    n_tokens: int = 12_000_000
    """Training tokens."""
    batch_size: int = 2048
    """Tokens per step."""
    seed: int = 0
    """Seed of features, tokens and weights."""
    device: str | None = None
    """Device for data and training; None uses a GPU if there is one."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "d_in", "n_features", "n_active", "d_sae", "k", "n_tokens", "batch_size")
        if self.n_active >= self.n_features:
            raise ValueError(f"n_active={self.n_active} must be less than n_features={self.n_features}.")


class ZipfRows:
    """Rows `sum_i z_i f_i` of random unit features; feature r is drawn with probability proportional to 1 / r.

    The number of draws per token is such that `n_active` distinct features are active on average. Only active features are
    touched, so the cost of a token is independent of `n_features`.
    """

    def __init__(self, config: LargeConfig, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(FEATURES + config.seed)
        self.features = normalize(torch.randn(config.n_features, config.d_in, generator=generator), dim=1).to(device)
        share = 1 / torch.arange(1, config.n_features + 1, dtype=torch.float64)
        share /= share.sum()
        self.draws = _draws(share, config.n_active)
        self.frequency = 1 - (1 - share) ** self.draws
        self._until = share.cumsum(0).float().to(device)

    def rows(self, n: int, generator: Generator) -> Float[Tensor, "n d_in"]:
        """n random tokens."""
        many = int(self.draws) + (torch.rand(n, device=self.device, generator=generator) < self.draws % 1)
        token = torch.arange(n, device=self.device).repeat_interleave(many)
        drawn = torch.rand(len(token), device=self.device, generator=generator)
        feature = torch.searchsorted(self._until, drawn).clamp_max(len(self.features) - 1)
        pair = (token * len(self.features) + feature).unique()
        token, feature = pair // len(self.features), pair % len(self.features)
        values = (1 + SPREAD * torch.randn(len(pair), device=self.device, generator=generator)).abs()
        counts = torch.bincount(token, minlength=n)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return decode(SparseActs(values, feature, offsets, len(self.features)), self.features)

    def stream(self, seed: int) -> Iterator[Float[Tensor, "chunk d_in"]]:
        """An endless stream of fresh tokens."""
        generator = torch.Generator(self.device).manual_seed(TOKENS + seed)
        while True:
            yield self.rows(CHUNK, generator)

    def held_out(self, n: int, seed: int) -> Iterator[Float[Tensor, "chunk d_in"]]:
        """At least n tokens that are in no stream."""
        generator = torch.Generator(self.device).manual_seed(HELD_OUT + seed)
        return (self.rows(CHUNK, generator) for _ in range(0, n, CHUNK))


def _draws(share: Tensor, n_active: int) -> float:
    """Number of draws that yields `n_active` distinct features on average, by bisection (it is monotone in the draws)."""
    low, high = 0.0, float(n_active)
    while float((1 - (1 - share) ** high).sum()) < n_active:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((1 - (1 - share) ** middle).sum()) < n_active else (low, middle)
    return high


def run_large(
    config: LargeConfig,
    out_dir: str | Path,
    *,
    variants: Sequence[str] = ("topk", "batch_topk"),
    every: int = MILLION,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Train the variants one after the other; one row per `every` tokens and a last one of held-out measures.

    Each row is passed to `say` as a line of text, and stored in `out_dir` (`large.json`, `large.csv`) beside the SAEs
    (`sae-VARIANT`). The same call resumes from the last checkpoint. Raises `ValueError` for an unknown variant.
    """
    check_variants(variants)
    configs = {name: at_l0(name, config.d_sae, config.k) for name in variants}
    n_tokens = -(-config.n_tokens // config.batch_size) * config.batch_size  # whole steps
    if n_tokens != config.n_tokens:
        say(f"Training reads {n_tokens:,} tokens, whole batches, where {config.n_tokens:,} were asked for.")
    training = TrainConfig(n_tokens, config.batch_size, seed=config.seed, device=config.device, checkpoint_every=500)
    data = ZipfRows(config, device_of(training))
    settings = dataclasses.asdict(config) | {"every": every}
    with open_rows(out_dir, settings, KEYS, "large") as rows:
        for name, one in configs.items():
            folder = Path(out_dir) / f"sae-{name}"
            teller = _Teller(folder, name, every, say)
            sae = train(one, teller.between(data.stream(config.seed)), training, folder, progress=progress)
            assert isinstance(sae, SAE)
            teller.tell()
            for tokens, line in _marks(folder, every).items():
                rows.get(lambda line=line: _measures(line), variant=name, tokens=tokens)
            rows.get(lambda sae=sae: held_out_row(sae, data, config), variant=name, tokens="held out")
            say(_line(rows.find(variant=name, tokens="held out") or {}))
        return list(rows.rows)


class _Teller:
    """Reports a line for every `every` tokens of training."""

    def __init__(self, folder: Path, name: str, every: int, say: Callable[[str], None]) -> None:
        self.folder, self.name, self.every, self.say = folder, name, every, say
        self.told = set(_marks(folder, every))  # by an earlier call

    def tell(self) -> None:
        for tokens, line in _marks(self.folder, self.every).items():
            if tokens not in self.told:
                self.say(_line({"variant": self.name, "tokens": tokens} | _measures(line)))
                self.told.add(tokens)

    def between(self, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the chunks, reporting new lines of the log before each."""
        for chunk in chunks:
            self.tell()
            yield chunk


def _marks(folder: Path, every: int) -> dict[int, Row]:
    """The first line of the log at or after each multiple of `every` tokens."""
    marks: dict[int, Row] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        marks.setdefault(line["tokens"] // every * every, line)
    return {tokens: line for tokens, line in marks.items() if tokens}


def _measures(line: Row) -> Row:
    return {"fvu": line["fvu"], "l0": line["l0"], "dead_fraction": line["dead_fraction_train"]}


def _line(row: Row) -> str:
    at = row["tokens"] if isinstance(row["tokens"], str) else f"{row['tokens']:,} tokens"
    more = "".join(f", {name} {row[name]:.3f}" for name in row if name.startswith("recovered"))
    return f"{row['variant']}, {at}: dead {row['dead_fraction']:.2%}, FVU {row['fvu']:.4f}, L0 {row['l0']:.1f}{more}"


@torch.no_grad()
def held_out_row(sae: SAE, data: ZipfRows, config: LargeConfig) -> Row:
    """FVU, L0 and dead fraction on `HELD_OUT_ROWS` fresh rows, and the fraction of planted features with a cosine above `FOUND`
    to a learned one: of all, of the most common tenth, of the rarest half."""
    measures = Reconstruction(sae)
    for x in data.held_out(HELD_OUT_ROWS, config.seed):
        measures.add(x, sae(x))
    found = torch.cat([_best_cosine(part, sae.W_dec) > FOUND for part in data.features.split(1024)]).float()
    n = len(found)
    results = {name: value for name, value in measures.results().items() if name in ("fvu", "l0", "dead_fraction")}
    return results | {
        "recovered": float(found.mean()),
        "recovered_common": float(found[: max(n // 10, 1)].mean()),
        "recovered_rare": float(found[n // 2 :].mean()),
    }


def _best_cosine(features: Tensor, learned: Tensor) -> Float[Tensor, " n"]:
    return (features @ normalize(learned, dim=1).T).amax(1)
