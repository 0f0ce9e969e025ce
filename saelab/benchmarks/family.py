"""`run_family`: train all variants side by side on one shared read of a model's cached activations, and evaluate them on
held-out documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from saelab.activation_cache.reader import ActivationCache
from saelab.benchmarks.baselines import BASELINES, baseline, levels
from saelab.benchmarks.measured import measure
from saelab.benchmarks.results import Row, Rows, open_rows
from saelab.benchmarks.synthetic import at_l0, check_variants
from saelab.identity import of_model
from saelab.io import load_sae, save_sae
from saelab.models import LanguageModel, load_model
from saelab.models.caching import Remembered
from saelab.saes import SAE, VARIANTS
from saelab.training import TrainConfig, train
from saelab.validation import check_at_least, check_fields

ALL_L0 = ("topk", "batch_topk", "jumprelu", "relu")
"""Variants that are trained at every L0; the others only at the first."""
TRANSCODERS = tuple(name for name, variant in VARIANTS.items() if variant.extra_dims == ("d_out",))
LAYERS = tuple(name for name, variant in VARIANTS.items() if variant.extra_dims == ("n_sources", "d_out"))
"""Variants of several inputs and outputs, which this benchmark leaves out."""
TABLES = {"crosscoder": "crosscoder", **dict.fromkeys(TRANSCODERS, "transcoder"), "codebook": "codebook"}
"""Table of each variant whose target or encoding is not comparable with the rest; all other variants are in "sae"."""
KEYS = ("variant", "target_l0", "seed")


@dataclass(frozen=True)
class FamilyConfig:
    """Settings shared by all rows of a family benchmark."""

    d_sae: int = 4096
    """Features of every SAE."""
    steps: int = 400
    """Training steps of every SAE."""
    batch_size: int = 2048
    """Activations per step."""
    eval_tokens: int | None = None
    """Held-out tokens to evaluate on; None uses all."""
    hook_name: str | None = None
    """Hook to train on, if the cache holds several."""
    hook_name_out: str | None = None
    """Hook of the cache that transcoders predict; None skips the transcoders."""
    eval_tokens_ce: int = 4096
    """Of the held-out tokens, those to measure the loss on; 0 measures none."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "d_sae", "steps", "batch_size", "eval_tokens")
        check_at_least(self, 0, "eval_tokens_ce")


def run_family(
    run: str | Path,
    config: FamilyConfig | None = None,
    *,
    variants: Sequence[str] | None = None,
    l0: Sequence[int] = (32, 16, 64),
    seeds: Sequence[int] = (0,),
    out_dir: str | Path | None = None,
    lm: LanguageModel | None = None,
    progress: bool = True,
) -> list[Row]:
    """Train all `variants` (None: every variant with a settable L0, and the baselines) on RUN/cache and evaluate each; one row
    per SAE. Returns all rows of `out_dir`, including those of earlier calls.

    All variants are trained at the first of `l0`; topk, batch_topk, jumprelu, relu and baselines also at the others. A codebook
    keeps its default `k`; a crosscoder reads all hooks of the cache and is skipped if there is only one. `out_dir` defaults to
    RUN/family: `rows.json` and `rows.csv` grow row by row, and `seed-N/` (a RUN for the dashboard) holds each seed's SAEs and
    reports. The same call resumes where it was interrupted, even in the middle of training. `lm` defaults to the model that
    the cache names. Raises `ValueError` for a variant that is unknown or cannot be trained this way, for an empty `l0` and
    for empty `seeds`.
    """
    if not seeds:
        raise ValueError("seeds is empty: list at least one.")
    config, cache = config or FamilyConfig(), ActivationCache(Path(run) / "cache")
    trained = None if variants is None else [name for name in variants if name not in BASELINES]
    configs = {} if trained == [] else _configs(trained, config, l0, len(cache.hook_names), cache.gradients is not None)
    untrained = [name for name in BASELINES if variants is None or name in variants]
    out_dir = Path(out_dir) if out_dir is not None else Path(run) / "family"
    origin = cache.origin(config.hook_name)
    settings = dataclasses.asdict(config) | {"hook_name": origin["hook_name"], "data": origin["dataset_fingerprint"]}
    lm = lm or Remembered(load_model(origin["model"]["name"]))
    settings |= {"rows_of": cache.manifest["config"], "model": of_model(lm)}
    with open_rows(out_dir, settings, KEYS) as rows:
        for seed in seeds:
            if any(rows.find(variant=name, target_l0=level, seed=seed) is None for name, level in configs):
                _run_seed(rows, configs, cache, config, seed, out_dir / f"seed-{seed}", lm, progress)
            _measure_baselines(rows, untrained, l0, cache, config, seed, lm, progress)
        return list(rows.rows)


def _configs(
    variants: Sequence[str] | None, config: FamilyConfig, l0: Sequence[int], n_hooks: int, gradients: bool = False
) -> dict[tuple[str, int], Any]:
    """The config of each (variant, L0)."""
    if not l0:
        raise ValueError("l0 is empty: list at least one number of active features per token.")
    check_variants(variants or ())
    for name in variants or ():
        if _config(name, config, l0[0], n_hooks, gradients) is None:
            raise ValueError(f"variants contains {name!r}, which {_NEEDS.get(name, 'has no setting for its L0')}.")
    wanted = [(name, level) for name in variants or VARIANTS for level in (l0 if name in ALL_L0 else l0[:1])]
    configs = {(name, level): _config(name, config, level, n_hooks, gradients) for name, level in wanted}
    return {(name, getattr(one, "k", level)): one for (name, level), one in configs.items() if one is not None}


_NEEDS = {
    "crosscoder": "needs a cache with at least two hooks",
    **{
        name: "needs a cache with gradients: saelab harvest RUN --hook-name HOOK --n-tokens NUMBER --gradients"
        for name, one in VARIANTS.items()
        if one.needs_gradients
    },
    **dict.fromkeys(TRANSCODERS, "needs hook_name_out: a second hook of the cache"),
    **dict.fromkeys(LAYERS, "needs the inputs and outputs of several layers, which this benchmark does not take"),
}


def _config(variant: str, config: FamilyConfig, level: int, n_hooks: int, gradients: bool) -> Any:
    """The config of a variant at an L0; None if it cannot be trained on this cache."""
    table = TABLES.get(variant, "sae")
    if variant in LAYERS or (table == "crosscoder" and n_hooks < 2):
        return None
    if table == "transcoder" and config.hook_name_out is None:
        return None
    if VARIANTS[variant].needs_gradients and not gradients:
        return None
    if table == "codebook":  # its codes have no values, so its k is not comparable with an L0
        return VARIANTS[variant].Config(d_sae=config.d_sae)
    preset = VARIANTS[variant].preset(config.steps * config.batch_size)
    return at_l0(variant, config.d_sae, level, hook_name_out=config.hook_name_out, **preset)


def _run_seed(
    rows: Rows,
    configs: Mapping[tuple[str, int], Any],
    cache: ActivationCache,
    config: FamilyConfig,
    seed: int,
    folder: Path,
    lm: LanguageModel,
    progress: bool,
) -> None:
    """Train all SAEs of one seed on one read of the cache, then evaluate them one by one."""
    training = TrainConfig(
        n_tokens=config.steps * config.batch_size,
        batch_size=config.batch_size,
        seed=seed,
        checkpoint_every=100,
    )
    saes = train(list(configs.values()), cache, training, folder, hook_name=config.hook_name, progress=progress)

    def columns(sae: SAE, level: int) -> Row:
        assert rows.folder is not None
        return {"table": TABLES.get(sae.variant, "sae"), **_measured(sae, lm, level, config, rows.folder)}

    pairs = tqdm(zip(configs, saes, strict=True), "Measuring", len(saes), unit="SAE", disable=not progress)
    for (variant, level), sae in pairs:
        key = {"variant": variant, "target_l0": level, "seed": seed}
        rows.get(lambda sae=sae, level=level: columns(sae, level), **key)


def _measured(sae: SAE, lm: LanguageModel, level: int, config: FamilyConfig, home: Path) -> Row:
    return measure(sae, lm, level, config.eval_tokens, home, n_tokens_ce=config.eval_tokens_ce)


def _measure_baselines(
    rows: Rows,
    names: Sequence[str],
    l0: Sequence[int],
    cache: ActivationCache,
    config: FamilyConfig,
    seed: int,
    lm: LanguageModel,
    progress: bool,
) -> None:
    """Add the rows of the baselines; their SAEs stand beside the trained ones."""
    assert rows.folder is not None
    hook_name, home = config.hook_name or cache.hook_names[0], rows.folder

    def measured(name: str, level: int) -> Row:
        sae = baseline(name, cache, hook_name, level, config.d_sae, seed)
        folder = save_sae(sae, home / f"seed-{seed}" / f"sae-{name}-{level}")
        return {"table": "baseline", **_measured(load_sae(folder), lm, level, config, home)}

    each = [(name, level) for name in names for level in levels(name, l0, lm.d_in(hook_name))]
    for name, level in tqdm(each, "Measuring baselines", unit="SAE", disable=not (progress and each)):
        rows.get(lambda name=name, level=level: measured(name, level), variant=name, target_l0=level, seed=seed)
