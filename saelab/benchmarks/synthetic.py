"""`run_synthetic`: train and measure every variant on small synthetic data with known features, seconds to minutes per SAE."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelab.benchmarks.absorption import absorption
from saelab.benchmarks.diffing import exclusives, own_ratios
from saelab.benchmarks.planted import Planted, diffing, hierarchy, superposition
from saelab.benchmarks.recovery import recovery
from saelab.benchmarks.results import Row, Rows, open_rows
from saelab.evaluation.crosscoder import compare_decoders
from saelab.evaluation.reconstruction import Reconstruction, VarianceSums
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE, VARIANTS, CrosscoderSAE, StepInfo
from saelab.saes.threshold import ThresholdSAE
from saelab.saes.zipf import underused
from saelab.training import TrainConfig, train

BATCH = 512
HELD_OUT_ROWS = 32 * BATCH
KEYS = ("data", "sae", "seed")

# By label: the variant, and the options that differ from its defaults.
SAES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in VARIANTS},
    "topk, no aux": ("topk", {"auxk_alpha": 0.0}),
    "topk, aux_zipf": ("topk", {"aux": "aux_zipf"}),
    "mutual_choice, no aux": ("mutual_choice", {"auxk_alpha": 0.0}),
    "crosscoder, L1": ("crosscoder", {"sparsity": "l1", "l1_coefficient": 1.2}),  # used if it has no target_l0
    "crosscoder, BatchTopK": ("crosscoder", {"sparsity": "batch_topk"}),
}
_CHOICES = ("topk", "batch_topk", "mutual_choice", "feature_choice")
_AUX = ("topk, no aux", "topk, aux_zipf", "mutual_choice, no aux")


@dataclass(frozen=True)
class Kind:
    """A kind of data, the SAEs trained on it, and their size and L0."""

    planted: Callable[[int], Planted]
    saes: tuple[str, ...]
    d_sae: int = 64
    l0: int = 3
    n_steps: int = 1500
    signed: bool = False


KINDS: dict[str, Kind] = {
    "flat": Kind(superposition, (*_CHOICES, "abs_topk", "matryoshka", "matching_pursuit", "jumprelu", "gated", "relu")),
    "zipf": Kind(partial(superposition, zipf=True), (*_CHOICES, *_AUX)),
    "mixed": Kind(partial(superposition, mixed=True), _CHOICES),
    "noisy": Kind(partial(superposition, noise=0.3), ("topk", "masked_topk"), 128, 6),  # more of both than is true
    "signed": Kind(partial(superposition, signed=True), ("topk", "abs_topk"), signed=True),
    "hierarchy": Kind(hierarchy, ("topk", "batch_topk", "matryoshka", "matching_pursuit"), 40, 2, 5000),
    "diffing": Kind(diffing, ("crosscoder, L1", "crosscoder, BatchTopK"), 48, 3, 3000),
}
FSM = "fsm"
"""A language model with codebooks on texts of a finite-state machine (`fsm.py`); it has no planted features."""
DATA = (*KINDS, FSM)


def run_synthetic(
    seeds: Sequence[int] = (0, 1, 2),
    out_dir: str | Path | None = None,
    *,
    data: Sequence[str] = DATA,
    n_steps: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Train and measure every available variant on every kind of `data`, once per seed; one row each.

    With `out_dir` each row is stored as soon as it is finished (`rows.json`, `rows.csv`) and not computed again. `n_steps`
    overrides the number of steps of every kind. Raises `ValueError` for an unknown kind of data and for empty `seeds`.
    """
    if not seeds:
        raise ValueError("seeds is empty: list at least one.")
    if unknown := [name for name in data if name not in DATA]:
        raise ValueError(f"data={unknown[0]!r} must be one of {', '.join(DATA)}.")
    runs = [(name, label, seed) for name in data for label in _labels(name) for seed in seeds]
    with open_rows(out_dir, {"n_steps": n_steps, "batch_size": BATCH}, KEYS) as rows:
        bar = tqdm(runs, desc="Synthetic", unit="SAE", disable=not progress)
        return [_row(rows, name, label, seed, n_steps, bar) for name, label, seed in bar]


def at_l0(variant: str, d_sae: int, l0: int, **options: Any) -> Any:
    """The config of a variant with `l0` features per token, set by `k`, or by `target_l0` if a penalty enforces sparsity.

    None if there is no such variant, or if its config lacks that field and `l1_coefficient` is not passed. Options that the
    config does not have are ignored.
    """
    if variant not in VARIANTS:
        return None
    known = {field.name for field in dataclasses.fields(VARIANTS[variant].Config)}
    by_penalty = options.get("sparsity") == "l1" or "k" not in known
    asked = "target_l0" if by_penalty else "k"
    if asked not in known and "l1_coefficient" not in options:
        return None
    options = {name: value for name, value in (options | {asked: l0}).items() if name in known}
    return VARIANTS[variant].Config(d_sae=d_sae, **options)


def check_variants(names: Sequence[str]) -> None:
    """Raise `ValueError` for an unknown variant."""
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"variants contains {name!r}, which is unknown; choose from {', '.join(VARIANTS)}.")


def _labels(data: str) -> list[str]:
    """The labels of the SAEs for a kind of data whose variants are available."""
    if data == FSM:
        return ["codebook"] if "codebook" in VARIANTS and find_spec("saelab.benchmarks.fsm") else []
    return [label for label in KINDS[data].saes if _config(data, label) is not None]


def _config(data: str, label: str) -> Any:
    """The config of an SAE, or None if its variant is not available. Planted data have their true origin at 0: no centring."""
    variant, options = SAES.get(label, (label, {}))
    return at_l0(variant, KINDS[data].d_sae, KINDS[data].l0, normalize="scale", **options)


def _row(rows: Rows, data: str, label: str, seed: int, n_steps: int | None, bar: Any) -> Row:
    bar.set_postfix_str(f"{data}: {label}, seed {seed}", refresh=False)
    return rows.get(lambda: measure_one(data, label, seed, n_steps), data=data, sae=label, seed=seed)


def measure_one(data: str, label: str, seed: int, n_steps: int | None) -> dict[str, Any]:
    """Train one SAE and measure it."""
    if data == FSM:
        return _measure_fsm(seed, n_steps)
    kind = KINDS[data]
    planted = kind.planted(seed)
    config = TrainConfig(
        n_tokens=(n_steps or kind.n_steps) * BATCH, batch_size=BATCH, lr=3e-3, warmup_steps=100, seed=seed
    )
    start = time.perf_counter()
    sae = train(_config(data, label), planted.stream(seed), config, progress=False)
    assert isinstance(sae, SAE)
    seconds = time.perf_counter() - start
    row = measure(sae, planted, planted.held_out(HELD_OUT_ROWS, seed), kind)
    row |= _absorption(sae, planted, seed) if "parents" in planted.groups else {}
    return {**row, "seconds": round(seconds, 2)}


def _measure_fsm(seed: int, n_steps: int | None) -> dict[str, Any]:
    """The numbers and strings among the results of the finite-state machine benchmark."""
    run_fsm: Any = import_module("saelab.benchmarks.fsm").run_fsm
    start = time.perf_counter()
    result = run_fsm(seed=seed, progress=False, **({"n_steps": n_steps} if n_steps else {}))
    row = {name: value for name, value in vars(result).items() if isinstance(value, int | float | str)}
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


@torch.no_grad()
def measure(sae: SAE, planted: Planted, x: Tensor, kind: Kind) -> dict[str, float | None]:
    """The columns of a row: recovery of the planted features, and sparsity and reconstruction on `x`.

    The columns `..._batch` use the batch-wise selection of training; the others encode each token independently, by
    thresholds if the variant has them.
    """
    output, decoder = sae(x), dictionary(sae)
    found = recovery(planted.features.flatten(1), decoder.flatten(1), kind.signed, planted.groups)
    fired = torch.bincount(output.acts.features, minlength=sae.d_sae) / len(x)
    sums = Reconstruction(sae)
    sums.add(x, output)
    row: dict[str, float | None] = {**found, "fvu": sums.variance.fvu, "l0": output.acts.nnz / len(x)}
    row |= {"bias": sums.relative_bias}
    row |= {
        "dead_fraction": float((fired == 0).float().mean()),
        "under_used": float(underused(fired, kind.l0 * len(x), len(x)).float().mean()),
    }
    if isinstance(sae, ThresholdSAE) and x.ndim == 2:
        row |= _by_batch(sae, x)
    if isinstance(sae, CrosscoderSAE):
        row |= exclusives(planted.features, decoder, compare_decoders(sae).delta, *own_ratios(sae, x))
    return row


@torch.no_grad()
def _absorption(sae: SAE, planted: Planted, seed: int) -> dict[str, float]:
    """Which parents of held-out tokens of a hierarchy have no feature on."""
    true_feature_acts = planted.held_out_feature_acts(HELD_OUT_ROWS, seed)
    fired = sae.encode(planted.held_out(HELD_OUT_ROWS, seed)).to_dense() != 0
    return absorption(planted.features, dictionary(sae), true_feature_acts, fired, planted.groups["parents"].stop)


def dictionary(sae: SAE) -> Tensor:
    """What a unit activation of each feature adds to the reconstruction, in the units of the data: `(d_sae, *d)`."""
    ones = SparseActs.from_dense(torch.eye(sae.d_sae))
    return sae.decode(ones) - sae.decode(SparseActs.from_dense(torch.zeros(1, sae.d_sae)))


def _by_batch(sae: ThresholdSAE, x: Tensor) -> Mapping[str, float | None]:
    """FVU and L0 with the batch-wise selection of training, on a copy because it updates the thresholds."""
    sae, info = copy.deepcopy(sae), StepInfo(torch.zeros(sae.d_sae, dtype=torch.bool), 1, 1)
    selected = [sae.select(sae.normalize(rows), info) for rows in x.split(BATCH)]
    x_hat = torch.cat([sae.decode(feature_acts) for feature_acts in selected])
    return {"fvu_batch": _fvu(x, x_hat), "l0_batch": sum(feature_acts.nnz for feature_acts in selected) / len(x)}


def _fvu(x: Tensor, x_hat: Tensor) -> float | None:
    sums = VarianceSums()
    sums.add(x.flatten(1), x_hat.flatten(1))
    return sums.fvu
