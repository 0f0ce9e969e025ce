"""`run_sweep`: train SAEs for all combinations of variants, widths, L0, learning rates and seeds, with one read of the cache
per seed, and evaluate each on held-out documents."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from saelab.activation_cache.reader import ActivationCache
from saelab.benchmarks.measured import measure
from saelab.benchmarks.results import Row, Rows, open_rows
from saelab.benchmarks.synthetic import at_l0, check_variants
from saelab.distributed import apart, rank_and_world_size
from saelab.errors import TrainingError
from saelab.identity import of_model, refusal
from saelab.models import LanguageModel, load_model
from saelab.models.caching import Remembered
from saelab.saes import SAE, VARIANTS
from saelab.training import TrainConfig, train
from saelab.training.checkpoint import AnotherRunError
from saelab.training.data import open_data
from saelab.training.loop import folder_name
from saelab.validation import check_at_least, check_fields

KEYS = ("variant", "d_sae", "target_l0", "lr", "seed")
"""The swept columns; `target_l0` is the requested L0, set by `k` or by the config's `target_l0`."""


@dataclass(frozen=True)
class SweepConfig:
    """Settings shared by all SAEs of a sweep."""

    n_tokens: int
    """Training tokens of every SAE."""
    batch_size: int = 2048
    """Activations per step."""
    eval_tokens: int | None = None
    """Held-out tokens to evaluate on; None uses all."""
    hook_name: str | None = None
    """Hook to train on, if the cache holds several."""
    hook_name_out: str | None = None
    """Hook of the cache that transcoders predict."""
    eval_tokens_ce: int = 4096
    """Of the tokens to evaluate on, those whose loss is measured: four passes of the model each; 0 measures none."""

    def __post_init__(self) -> None:
        check_fields(self)  # what is wrong here would be rejected only after training
        check_at_least(self, 1, "n_tokens", "batch_size", "eval_tokens")
        check_at_least(self, 0, "eval_tokens_ce")


class Point(NamedTuple):
    """One SAE of a sweep."""

    key: Row
    """Its values of `KEYS`."""
    config: Any
    train: TrainConfig


def run_sweep(
    run: str | Path,
    config: SweepConfig,
    *,
    out_dir: str | Path | None = None,
    lm: LanguageModel | None = None,
    progress: bool = True,
    **lists: Sequence[Any],
) -> list[Row]:
    """Train an SAE for each combination of `lists` (see `sweep_points`) on RUN/cache and evaluate it; one row per SAE.

    Returns all rows of `out_dir`, including those of earlier calls, sorted by variant, requested L0 and FVU. `out_dir`
    defaults to RUN: `sweep.json` and `sweep.csv` grow row by row beside the SAEs and their reports, and the same call resumes
    where it was interrupted, even in the middle of training. `lm` defaults to the model that the cache names. Under `torchrun`
    each rank trains its share of the SAEs without communication; rank 0 evaluates all, the others return no rows. Raises
    `ValueError`, before anything is written, for an empty list and for an SAE that cannot be trained.
    """
    cache = ActivationCache(Path(run) / "cache")
    points = sweep_points(config, **lists)
    origin = _origin(points, cache, config.hook_name)
    settings = dataclasses.asdict(config) | {"data": origin["dataset_fingerprint"]}
    if len(cache.hook_names) == 1:
        settings["hook_name"] = cache.hook_names[0]
    lm = lm or Remembered(load_model(origin["model"]["name"]))
    settings |= {"rows_of": cache.manifest["config"], "model": of_model(lm)}
    rank, n_processes = rank_and_world_size()
    home, mine = Path(out_dir or run), points[rank::n_processes]
    with apart():
        if rank:
            rows = Rows(home, settings, KEYS, "sweep", _order)
            for same in _by_seed(rows, mine):
                _train(same, cache, config, home, progress=False)
            return []
        with open_rows(home, settings, KEYS, "sweep", _order) as rows:
            for same in _by_seed(rows, points):
                _run_seed(rows, same, mine, cache, config, lm, progress)
            return list(rows.rows)


def sweep_points(
    config: SweepConfig,
    *,
    variants: Sequence[str] = ("topk",),
    d_sae: Sequence[int] = (4096,),
    k: Sequence[int] = (32,),
    lr: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (0,),
) -> list[Point]:
    """Every combination once. `k` sets `target_l0` for variants with a penalty; an `lr` of None is the variant's default.

    Raises `ValueError` for an empty list, an unknown variant, and values that a config rejects.
    """
    lists = {"variants": variants, "d_sae": d_sae, "k": k, "lr": lr, "seeds": seeds}
    for name, values in lists.items():
        if not values:
            raise ValueError(f"{name} is empty: list at least one.")
    check_variants(variants)
    points = []
    for values in itertools.product(*(dict.fromkeys(one) for one in lists.values())):
        key: Row = dict(zip(KEYS, values, strict=True))
        sae = at_l0(key["variant"], key["d_sae"], key["target_l0"], hook_name_out=config.hook_name_out)
        if sae is None:
            raise ValueError(f"variants contains {key['variant']!r}, which has neither k nor target_l0 to sweep over.")
        training = TrainConfig(config.n_tokens, config.batch_size, lr=key["lr"], seed=key["seed"])
        points.append(Point(key, sae, training))
    return points


def _origin(points: Sequence[Point], cache: ActivationCache, hook_name: str | None) -> dict[str, Any]:
    """Origin of the activations. Raises `ValueError` for an SAE that cannot be trained on this cache."""
    source = open_data(cache, hook_name)
    one_each = {point.key["variant"]: point.config for point in points}
    origins = [source.view(VARIANTS[variant], config).origin for variant, config in one_each.items()]
    if any("models" in origin for origin in origins) or len({origin["model"]["name"] for origin in origins}) > 1:
        raise ValueError(
            "A sweep evaluates its SAEs on one language model, but these read several. Train each with `saelab train` instead."
        )
    return origins[0]


def _by_seed(rows: Rows, points: Sequence[Point]) -> list[list[Point]]:
    """The points without a row, grouped by seed: the SAEs of one seed share a read of the cache."""
    left = [point for point in points if rows.find(**point.key) is None]
    seeds = dict.fromkeys(point.train.seed for point in left)
    return [[point for point in left if point.train.seed == seed] for seed in seeds]


def _run_seed(
    rows: Rows,
    points: Sequence[Point],
    mine: Sequence[Point],
    cache: ActivationCache,
    config: SweepConfig,
    lm: LanguageModel,
    progress: bool,
) -> None:
    """Train this rank's SAEs (`mine`) on one read, wait for those of the other ranks, then evaluate all one by one."""
    home = rows.folder
    assert home is not None
    _train([point for point in points if point in mine], cache, config, home, progress)
    for point in points:
        while point not in mine and not (home / folder_name(point.config, point.train) / "sae.json").exists():
            time.sleep(1)
    saes = _train(points, cache, config, home, progress=False)
    pairs = tqdm(zip(points, saes, strict=True), "Measuring", len(saes), unit="SAE", disable=not progress)
    for point, sae in pairs:
        level = point.key["target_l0"]
        rows.get(lambda sae=sae, level=level: _measure(sae, lm, level, config, home, progress), **point.key)


def _measure(sae: SAE, lm: LanguageModel, level: int, config: SweepConfig, home: Path, progress: bool) -> Row:
    return measure(sae, lm, level, config.eval_tokens, home, n_tokens_ce=config.eval_tokens_ce, progress=progress)


def _train(
    points: Sequence[Point], cache: ActivationCache, config: SweepConfig, home: Path, progress: bool
) -> list[SAE]:
    """Train these SAEs on one read of the cache; finished ones are loaded."""
    if not points:
        return []
    configs, trains = [point.config for point in points], [point.train for point in points]
    try:
        return train(configs, cache, trains, home, hook_name=config.hook_name, progress=progress)
    except AnotherRunError as error:  # from a sweep with other settings, interrupted before its first row
        raise TrainingError(refusal(error.folder, "run", error.different, "choose another --out-dir")) from error


def _order(row: Row) -> tuple[Any, ...]:
    """Sort key of rows: variant, requested L0 and FVU; rows without an FVU come last."""
    return row["variant"], row["target_l0"], row["fvu"] is None, row["fvu"]
