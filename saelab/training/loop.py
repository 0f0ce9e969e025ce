"""`saelab.train`: trains one or several SAEs on one stream of rows."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, overload

from torch import Tensor
from tqdm.auto import tqdm

from saelab.distributed import init_distributed
from saelab.distributed.mesh import build_mesh
from saelab.errors import TrainingError
from saelab.kernels.allocator import keep_freed_memory
from saelab.saes import SAE
from saelab.training.checkpoint import claimed
from saelab.training.config import TrainConfig
from saelab.training.control import with_control
from saelab.training.data import open_data
from saelab.training.data_source import ROW_LABELS, DataSource, Rows
from saelab.training.device_rows import ahead_on, common_device
from saelab.training.interrupt import interrupt_between_steps
from saelab.training.kept_out import calibration_rows
from saelab.training.memory import check_memory, free_bytes, plan_memory
from saelab.training.rules import rules_of
from saelab.training.sae_run import Run, device_of, variant_of

_LOG = logging.getLogger("saelab")


@overload
def train(
    config: Sequence[Any],
    data: Any,
    train_config: TrainConfig | Sequence[TrainConfig],
    out_dir: str | Path | None = None,
    *,
    hook_name: str | None = None,
    control: Any = None,
    progress: bool = True,
    wandb_project: str | None = None,
) -> list[SAE]: ...
@overload
def train(
    config: Any,
    data: Any,
    train_config: TrainConfig,
    out_dir: str | Path | None = None,
    *,
    hook_name: str | None = None,
    control: Any = None,
    progress: bool = True,
    wandb_project: str | None = None,
) -> SAE: ...
def train(
    config: Any,
    data: Any,
    train_config: TrainConfig | Sequence[TrainConfig],
    out_dir: str | Path | None = None,
    *,
    hook_name: str | None = None,
    control: Any = None,
    progress: bool = True,
    wandb_project: str | None = None,
) -> SAE | list[SAE]:
    """Train the SAE of `config`, or one for each config of a list, side by side on the same batches.

    `data` is a cache, a cache's path, a stream, a tensor or NumPy array `(n, d_in)` (shuffled, repeated as needed) or an
    iterator of such tensors; `hook_name` selects the hook that an SAE or transcoder reads if there are several. A crosscoder
    reads the hooks that its config names, or tensors `(n, n_sources, d_in)`; a transcoder predicts its config's
    `hook_name_out`, or the y of a `Batch(x, y)` of tensors; for csr, y is a second view of each row; a gradient SAE reads
    a cache with gradients, or a `Batch(x, x, gradient)`. For a list, `train_config` may be a list too, one for each SAE, with
    the same `n_tokens`, `batch_size`, `seed` and `feature_shards`.
    `out_dir` is the SAE's folder (for a list: the RUN folder, in which each gets `sae-NAME/`); without it nothing is written.
    Repeating the call resumes where it stopped, bit for bit, and returns at once if it had finished; Ctrl-C writes a
    checkpoint first.

    `control` are rows that an SAE with `normalize="whiten"` whitens by, given like `data`; by default `data` itself.

    Under `torchrun` every rank makes this call with the same arguments and takes its share of the rows of each batch; only
    rank 0 writes. With `feature_shards` S the features of each SAE are sharded over S ranks, and rank 0 returns the whole
    SAE.

    Raises `ValueError` for bad arguments, `TrainingError` if there is not enough memory, if activations or loss become
    non-finite, or if `out_dir` holds another run.
    """
    keep_freed_memory()
    several = isinstance(config, Sequence)
    configs = list(config) if several else [config]
    if not configs:
        raise ValueError("The list of SAE configs is empty; pass at least one.")
    trains = _train_configs(train_config, configs, several)
    ranks = init_distributed()
    mesh = build_mesh(ranks, trains[0].feature_shards, trains[0].device)
    folder_given = Path(out_dir) if out_dir is not None else None
    folders = (
        _folders(configs, folder_given, trains if isinstance(train_config, Sequence) else None)
        if several
        else [folder_given]
    )
    rules = rules_of(folders, ranks, device_of(trains[0]))
    source = open_data(data, hook_name, rules, common_device(map(device_of, trains)))
    source = with_control(source, None if control is None else open_data(control, hook_name, rules), configs)
    if ranks.is_main_process:
        _warn_if_few(source, trains[0].batch_size)
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(claimed(folder if ranks.is_main_process else None))
        each = list(zip(configs, trains, folders, strict=True))
        _check_memory(each, source, progress and ranks.is_main_process)
        runs = [Run(one, source, train, folder, wandb_project, mesh, rules) for one, train, folder in each]
        _train_all([run for run in runs if not run.finished], source, trains[0], progress and ranks.is_main_process)
    saes = [run.sae for run in runs]
    return saes if several else saes[0]


def _check_memory(each: list[tuple[Any, TrainConfig, Path | None]], source: DataSource, progress: bool) -> None:
    """Log what memory unfinished SAEs will need, and what they read. Raises `TrainingError` if it exceeds what is free."""
    left = [(one, train) for one, train, folder in each if folder is None or not (folder / "sae.json").exists()]
    if not left:
        return
    device = device_of(left[0][1])
    plans = [plan_memory(kind := variant_of(one), one, source.view(kind, one), train, device) for one, train in left]
    said = check_memory([*plans, {"cpu": {"reading": source.held_bytes}}], free_bytes(device))
    if progress:
        _LOG.info(said)
        _say_tokens(left[0][1])


def _say_tokens(config: TrainConfig) -> None:
    """Log how many tokens are read where that is not as many as were asked for."""
    n_read = config.n_steps * config.batch_size
    if n_read != config.n_tokens:
        _LOG.info(
            f"Training reads {n_read:,} of the {config.n_tokens:,} tokens asked for: {config.n_steps:,} whole batches."
        )


_COMMON = ("n_tokens", "batch_size", "seed", "feature_shards")
"""Fields of `TrainConfig` that determine batches and placement, so they must be the same for SAEs trained side by side."""


def _train_configs(given: Any, configs: list[Any], several: bool) -> list[TrainConfig]:
    """One per SAE config. Raises `ValueError` if their numbers differ, or they cannot share the same batches."""
    trains = list(given) if several and isinstance(given, Sequence) else [given] * len(configs)
    for train in trains:
        if not isinstance(train, TrainConfig):
            raise ValueError(f"train_config={train!r} is not a saelab.TrainConfig; pass TrainConfig(n_tokens=...).")
    if len(trains) != len(configs):
        raise ValueError(
            f"{len(trains)} TrainConfigs for {len(configs)} SAE configs: pass one for all, or one for each."
        )
    for name in _COMMON:
        values = list(dict.fromkeys(getattr(train, name) for train in trains))
        if len(values) > 1:
            raise ValueError(
                f"{name}={' and '.join(map(str, values))}: SAEs trained side by side see the same batches, so it must "
                f"be the same for all; call train once for each {name}."
            )
    return trains


def _warn_if_few(source: DataSource, batch_size: int) -> None:
    """Warn, at the line that called `train`, if all rows together do not fill a batch."""
    if source.n_rows is not None and source.n_rows < batch_size:
        warnings.warn(
            f"There are {source.n_rows:,} different rows, fewer than one batch of {batch_size:,}: the SAE will "
            "memorise them. Harvest more tokens (100,000 or more), or lower batch_size.",
            stacklevel=3,
        )


def _train_all(runs: list[Run], source: DataSource, config: TrainConfig, progress: bool) -> None:
    """Feed every unfinished run from the earliest step any of them needs."""
    if not runs:
        return
    first, ranks = min(run.step for run in runs), runs[0].ranks
    hooks = list(dict.fromkeys(hook for run in runs for hook in run.hooks.columns))
    batches = source.batches(hooks, config.batch_size, config.seed, first)
    if any(run.sae.needs_labels for run in runs):
        batches = _with_labels(batches, source.labels(config.batch_size, config.seed, first))
    if ranks.size == 1:  # several ranks each copy only their own rows
        batches = ahead_on(common_device(run.device for run in runs), batches, source.pinned)
    options: dict[str, Any] = {"desc": "Training", "unit": "step", "disable": not progress}
    with tqdm(total=config.n_steps, initial=first, **options) as bar, interrupt_between_steps() as interrupt:
        for run in runs:
            run.sae.shows_progress = progress
        rows: Rows | None = None
        for step in range(first, config.n_steps):
            if ranks.any_rank(interrupt.asked, runs[0].device):
                _stop(runs)
            rows = next(batches, None)
            if rows is None:
                raise TrainingError(
                    f"The data ended after {step * config.batch_size} of {config.n_tokens} tokens; pass more, or lower n_tokens."
                )
            for run in runs:
                if run.step == step:
                    run.train_step(rows)
            bar.update()
            if step % config.log_every == 0:
                bar.set_postfix_str(_summary(runs, bar, config.batch_size), refresh=False)
        assert rows is not None
        unseen, kept_out = calibration_rows(source, hooks, batches, rows, config.n_tokens)
        for run in runs:
            run.finish(rows, unseen, kept_out)
        ranks.barrier(runs[0].device)  # no rank continues before everything is written


def _with_labels(batches: Iterator[Rows], labels: Iterator[Tensor]) -> Iterator[Rows]:
    return ({**rows, ROW_LABELS: next(labels)} for rows in batches)


def _stop(runs: list[Run]) -> NoReturn:
    """Write a checkpoint of every run, then raise `KeyboardInterrupt`."""
    for run in runs:
        run.checkpoint()
    kept = [f"{run.folder} resumes from step {run.step}" for run in runs if run.folder is not None and run.step]
    raise KeyboardInterrupt("; ".join(kept) or "Nothing from this training run was saved")


def _summary(runs: list[Run], bar: Any, batch_size: int) -> str:
    """FVU, L0 and dead share of each SAE, and the common speed."""

    def each(key: str, form: str) -> str:
        return "/".join(form.format(run.last.get(key, float("nan"))) for run in runs)

    rate = (bar.format_dict["rate"] or 0) * batch_size
    kl = f"kl {each('kl', '{:.4f}')}, " if any("kl" in run.last for run in runs) else ""
    return (
        f"{kl}fvu {each('fvu', '{:.3f}')}, l0 {each('l0', '{:.1f}')}, "
        f"dead {each('dead_fraction_train', '{:.1%}')}, {rate:,.0f} tokens/s"
    )


def _folders(configs: list[Any], out_dir: str | Path | None, trains: list[TrainConfig] | None) -> list[Path | None]:
    """One folder per config in `out_dir`, with distinct names; `trains` if each SAE has its own `TrainConfig`."""
    if out_dir is None:
        return [None] * len(configs)
    names: list[str] = []
    for i, config in enumerate(configs):
        name = folder_name(config, None if trains is None else trains[i])
        same = sum(other == name or other.startswith(f"{name}--") for other in names)
        names.append(f"{name}--{same + 1}" if same else name)
    return [Path(out_dir) / name for name in names]


def folder_name(config: Any, train: TrainConfig | None) -> str:
    """`sae-VARIANT-D_SAE[-kK][-lL0]`, and `[-lrLR]-seedSEED` for an SAE with its own `train`."""
    name = f"sae-{variant_of(config).variant}-{config.d_sae}"
    sizes = dataclasses.asdict(config)
    name += f"-k{sizes['k']}" if "k" in sizes else ""
    name += f"-l{sizes['target_l0']:g}" if sizes.get("target_l0") is not None else ""
    if train is not None:
        name += f"{'' if train.lr is None else f'-lr{float(train.lr)!r}'}-seed{train.seed}"
    return name
