"""`run_synthetic`: every variant on data with known features, small enough for seconds a run, and the papers' claims held
against what comes out."""

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

from saelab.benchmarks.diffing import exclusives, own_ratios
from saelab.benchmarks.planted import Planted, diffing, hierarchy, superposition
from saelab.benchmarks.recovery import recovery
from saelab.benchmarks.results import Row, Rows, open_rows
from saelab.evaluation.crosscoder import compare_decoders
from saelab.evaluation.reconstruction import VarianceSums
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE, VARIANTS, CrosscoderSAE, StepInfo
from saelab.saes.threshold import ThresholdSAE
from saelab.saes.zipf import underused
from saelab.training import TrainConfig, train

BATCH = 512
HELD_OUT_ROWS = 32 * BATCH
KEYS = ("data", "sae", "seed")

# Label: the variant, and what differs from its defaults.
SAES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in VARIANTS},
    "topk, no aux": ("topk", {"auxk_alpha": 0.0}),
    "topk, aux_zipf": ("topk", {"aux": "aux_zipf"}),
    "mutual_choice, no aux": ("mutual_choice", {"auxk_alpha": 0.0}),
    "crosscoder, L1": ("crosscoder", {"sparsity": "l1", "l1_coefficient": 1.2}),  # if it knows no target_l0
    "crosscoder, BatchTopK": ("crosscoder", {"sparsity": "batch_topk"}),
}
_CHOICES = ("topk", "batch_topk", "mutual_choice", "feature_choice")
_AUX = ("topk, no aux", "topk, aux_zipf", "mutual_choice, no aux")


@dataclass(frozen=True)
class Kind:
    """Data, the SAEs that see it, and how many features and active ones they get."""

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
    "signed": Kind(partial(superposition, signed=True), ("topk", "abs_topk"), signed=True),
    "hierarchy": Kind(hierarchy, ("topk", "batch_topk", "matryoshka", "matching_pursuit"), 40, 2, 5000),
    "diffing": Kind(diffing, ("crosscoder, L1", "crosscoder, BatchTopK"), 48, 3, 3000),
}
FSM = "fsm"
"""Texts of a finite-state machine and a model with codebooks in it (`fsm.py`): nothing is planted there."""
DATA = (*KINDS, FSM)


def run_synthetic(
    seeds: Sequence[int] = (0, 1, 2),
    out_dir: str | Path | None = None,
    *,
    data: Sequence[str] = DATA,
    n_steps: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Train and measure every variant that is there on every kind of `data`, once a seed; one row each.

    With `out_dir` a finished row is kept there at once (`rows.json`, `rows.csv`) and never computed again. `n_steps`
    replaces each kind's own number of steps. Raises `ValueError` for a kind that there is not, and without seeds.
    """
    if not seeds:
        raise ValueError("seeds is empty: give at least one.")
    if unknown := [name for name in data if name not in DATA]:
        raise ValueError(f"data={unknown[0]!r} must be one of {', '.join(DATA)}.")
    runs = [(name, label, seed) for name in data for label in _labels(name) for seed in seeds]
    with open_rows(out_dir, {"n_steps": n_steps, "batch_size": BATCH}, KEYS) as rows:
        bar = tqdm(runs, desc="Synthetic", unit="SAE", disable=not progress)
        return [_row(rows, name, label, seed, n_steps, bar) for name, label, seed in bar]


def at_l0(variant: str, d_sae: int, l0: int, **options: Any) -> Any:
    """The config of a variant with `l0` features a token: `k`, or `target_l0` where a penalty makes codes sparse.

    None where there is no such variant, or it cannot be asked for an L0 and `l1_coefficient` is not given. Options that its
    config does not know are left out.
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
    """Raise `ValueError` for a variant that there is not."""
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"variants holds {name!r}; there are {', '.join(VARIANTS)}.")


def _labels(data: str) -> list[str]:
    """The SAEs of a kind of data whose variants are there."""
    if data == FSM:
        return ["codebook"] if "codebook" in VARIANTS and find_spec("saelab.benchmarks.fsm") else []
    return [label for label in KINDS[data].saes if _config(data, label) is not None]


def _config(data: str, label: str) -> Any:
    """The planted zero is the data's own, so nothing is centred; None where the variant is not there."""
    variant, options = SAES.get(label, (label, {}))
    return at_l0(variant, KINDS[data].d_sae, KINDS[data].l0, normalize="scale", **options)


def _row(rows: Rows, data: str, label: str, seed: int, n_steps: int | None, bar: Any) -> Row:
    bar.set_postfix_str(f"{data}: {label}, seed {seed}", refresh=False)
    return rows.get(lambda: _measure_one(data, label, seed, n_steps), data=data, sae=label, seed=seed)


def _measure_one(data: str, label: str, seed: int, n_steps: int | None) -> dict[str, Any]:
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
    return {**measure(sae, planted, planted.held_out(HELD_OUT_ROWS, seed), kind), "seconds": round(seconds, 2)}


def _measure_fsm(seed: int, n_steps: int | None) -> dict[str, Any]:
    """The numbers and names that the finite-state machine's own bench gives."""
    run_fsm: Any = import_module("saelab.benchmarks.fsm").run_fsm
    start = time.perf_counter()
    result = run_fsm(seed=seed, progress=False, **({"n_steps": n_steps} if n_steps else {}))
    row = {name: value for name, value in vars(result).items() if isinstance(value, int | float | str)}
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


@torch.no_grad()
def measure(sae: SAE, planted: Planted, x: Tensor, kind: Kind) -> dict[str, float | None]:
    """The columns of a row: what was found of the planted features, and what codes and reconstruction are on `x`.

    `..._batch` are codes as training selects them; the others stand alone, by thresholds where the variant has them.
    """
    output, decoder = sae(x), dictionary(sae)
    found = recovery(planted.features.flatten(1), decoder.flatten(1), kind.signed, planted.groups)
    fired = torch.bincount(output.acts.features, minlength=sae.d_sae) / len(x)
    row: dict[str, float | None] = {**found, "fvu": _fvu(x, output.x_hat), "l0": output.acts.nnz / len(x)}
    row |= {
        "dead_fraction": float((fired == 0).float().mean()),
        "under_used": float(underused(fired, kind.l0 * len(x), len(x)).float().mean()),
    }
    if isinstance(sae, ThresholdSAE) and x.ndim == 2:
        row |= _by_batch(sae, x)
    if isinstance(sae, CrosscoderSAE):
        row |= exclusives(planted.features, decoder, compare_decoders(sae).delta, *own_ratios(sae, x))
    return row


def dictionary(sae: SAE) -> Tensor:
    """What one unit of each feature adds to a reconstruction, in the units of the data: `(d_sae, *d)`."""
    ones = SparseActs.from_dense(torch.eye(sae.d_sae))
    return sae.decode(ones) - sae.decode(SparseActs.from_dense(torch.zeros(1, sae.d_sae)))


def _by_batch(sae: ThresholdSAE, x: Tensor) -> Mapping[str, float | None]:
    """FVU and L0 with the selection of training, batch by batch, on a copy whose thresholds may move."""
    sae, info = copy.deepcopy(sae), StepInfo(torch.zeros(sae.d_sae, dtype=torch.bool), 1, 1)
    feature_acts = [sae.select(sae.normalize(part), info) for part in x.split(BATCH)]
    x_hat = torch.cat([sae.decode(feature_acts) for feature_acts in feature_acts])
    return {"fvu_batch": _fvu(x, x_hat), "l0_batch": sum(feature_acts.nnz for feature_acts in feature_acts) / len(x)}


def _fvu(x: Tensor, x_hat: Tensor) -> float | None:
    sums = VarianceSums()
    sums.add(x.flatten(1), x_hat.flatten(1))
    return sums.fvu
