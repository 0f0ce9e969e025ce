"""`run_family`: all variants on a model's cached activations, trained side by side on one shared read, measured on
documents that none of them saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from saelab.activation_cache.reader import ActivationCache
from saelab.benchmarks.measured import measure
from saelab.benchmarks.results import Row, Rows, open_rows
from saelab.benchmarks.synthetic import at_l0, check_variants
from saelab.identity import of_model
from saelab.models import LanguageModel, load_model
from saelab.models.caching import Remembered
from saelab.saes import SAE, VARIANTS
from saelab.training import TrainConfig, train

ALL_L0 = ("topk", "batch_topk", "jumprelu", "relu")
"""Variants that are trained at every L0; the others at the first alone."""
TABLES = {
    "crosscoder": "crosscoder",
    "transcoder": "transcoder",
    "skip_transcoder": "transcoder",
    "codebook": "codebook",
}
"""Variants whose target or code is another, and the table of their own that they stand in; all others are in "sae"."""
KEYS = ("variant", "target_l0", "seed")


@dataclass(frozen=True)
class FamilyConfig:
    """What all rows of a family bench have in common."""

    d_sae: int = 4096
    """Features of every SAE."""
    steps: int = 400
    """Training steps of every SAE."""
    batch_size: int = 2048
    """Activations in a step."""
    eval_tokens: int | None = None
    """Held-out tokens to measure on; None is all."""
    hook_name: str | None = None
    """Site, where the cache holds several."""
    hook_name_out: str | None = None
    """Site of the cache that transcoders predict; None leaves them out."""


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
    """Train all `variants` (None: every one that can be asked for an L0) on RUN/cache and measure each; one row each.

    Gives all rows of `out_dir`, those of earlier calls too.

    All are trained at the first of `l0`, topk, batch_topk, jumprelu and relu at the others too; a codebook with the `k` of its
    defaults, a crosscoder on all hooks of the cache where it holds several. `out_dir` is RUN/family
    unless given: `rows.json` and `rows.csv` grow row by row, each seed's SAEs and reports lie in `seed-N/` (a RUN for the
    dashboard), and the same call goes on where it was stopped, in the middle of training too. `lm` None is the model that
    the cache names. Raises `ValueError` for a variant that there is not or that cannot be trained so, and without seeds.
    """
    if not seeds:
        raise ValueError("seeds is empty: give at least one.")
    config, cache = config or FamilyConfig(), ActivationCache(Path(run) / "cache")
    configs = _configs(variants, config, l0, len(cache.hook_names))
    out_dir = Path(out_dir) if out_dir is not None else Path(run) / "family"
    origin = cache.origin(config.hook_name)
    settings = dataclasses.asdict(config) | {"hook_name": origin["hook_name"], "data": origin["dataset_fingerprint"]}
    lm = lm or Remembered(load_model(origin["model"]["name"]))
    settings |= {"rows_of": cache.manifest["config"], "model": of_model(lm)}
    with open_rows(out_dir, settings, KEYS) as rows:
        for seed in seeds:
            if any(rows.find(variant=name, target_l0=level, seed=seed) is None for name, level in configs):
                _run_seed(rows, configs, cache, config, seed, out_dir / f"seed-{seed}", lm, progress)
        return list(rows.rows)


def _configs(
    variants: Sequence[str] | None, config: FamilyConfig, l0: Sequence[int], n_hooks: int
) -> dict[tuple[str, int], Any]:
    """(variant, L0): its config."""
    if not l0:
        raise ValueError("l0 is empty: give at least one number of features that fire on a token.")
    check_variants(variants or ())
    for name in variants or ():
        if _config(name, config, l0[0], n_hooks) is None:
            raise ValueError(f"variants holds {name!r}, which {_NEEDS.get(name, 'cannot be asked for an L0')}.")
    wanted = [(name, level) for name in variants or VARIANTS for level in (l0 if name in ALL_L0 else l0[:1])]
    configs = {(name, level): _config(name, config, level, n_hooks) for name, level in wanted}
    return {(name, getattr(one, "k", level)): one for (name, level), one in configs.items() if one is not None}


_NEEDS = {
    "crosscoder": "needs a cache of two hooks or more",
    **dict.fromkeys(("transcoder", "skip_transcoder"), "needs hook_name_out, a second hook of the cache"),
}


def _config(variant: str, config: FamilyConfig, level: int, n_hooks: int) -> Any:
    """None where it cannot be trained on this cache."""
    table = TABLES.get(variant, "sae")
    if (table == "crosscoder" and n_hooks < 2) or (table == "transcoder" and config.hook_name_out is None):
        return None
    if table == "codebook":  # its k codes have no values: k is another thing than L0
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
    """Train all SAEs of one seed on one read, then measure one after another."""
    training = TrainConfig(
        n_tokens=config.steps * config.batch_size,
        batch_size=config.batch_size,
        seed=seed,
        checkpoint_every=100,
    )
    saes = train(list(configs.values()), cache, training, folder, hook_name=config.hook_name, progress=progress)

    def columns(sae: SAE, level: int) -> Row:
        assert rows.folder is not None
        return {"table": TABLES.get(sae.variant, "sae"), **measure(sae, lm, level, config.eval_tokens, rows.folder)}

    pairs = tqdm(zip(configs, saes, strict=True), "Measuring", len(saes), unit="SAE", disable=not progress)
    for (variant, level), sae in pairs:
        key = {"variant": variant, "target_l0": level, "seed": seed}
        rows.get(lambda sae=sae, level=level: columns(sae, level), **key)
