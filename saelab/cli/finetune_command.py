"""`saelab finetune`: an SAE of a run trained further inside its model, or a new one trained there from the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from saelab.cli.commands import Column, Dtype, OwnModel, OwnTexts, Run, runs_of
from saelab.hints.next_commands import after_training, check_has_cache
from saelab.run_folder.opening import load_lm, with_model
from saelab.runs import named_sae

_WEIGHT = "Weight of the SAE's own loss (FVU + AuxK) beside the KL; 0 trains by the KL alone."
_LR = "Peak learning rate; None: the variant's own, for a trained SAE a tenth of it."
_NAME = "Write to sae-NAME; None: the SAE's own name with -finetuned, or sae-end-to-end."


@dataclass(frozen=True)
class Training:
    """Flags of the optimisation."""

    n_tokens: Annotated[int, arg(help="Tokens to read.")]
    batch_size: Annotated[int, arg(help="Tokens per step, a multiple of the context length.")] = 1024
    lr: Annotated[float | None, arg(help=_LR)] = None
    seed: Annotated[int, arg(help="Seed of the order of contexts, and of new weights.")] = 0
    checkpoint_every: Annotated[int, arg(help="Steps between checkpoints.")] = 50


@dataclass(frozen=True)
class New:
    """Flags that describe a new SAE."""

    variant: Annotated[str | None, arg(help="With --from-scratch: SAE variant; None means topk.")] = None
    d_sae: Annotated[int | None, arg(help="With --from-scratch: number of features; None means 4096.")] = None
    k: Annotated[int | None, arg(help="With --from-scratch: features per token; None means 32.")] = None
    hook_name: Annotated[str | None, arg(help="With --from-scratch: hook to train on, if the cache holds several.")] = (
        None
    )

    def refuse(self) -> None:
        """Raise `ValueError` for any that is given."""
        if given := [field.name for field in fields(self) if getattr(self, field.name) is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags}: only with --from-scratch; an SAE is finetuned as it is.")

    def config(self) -> Any:
        """The config of the SAE."""
        from saelab.saes import VARIANTS

        if (variant := self.variant or "topk") not in VARIANTS:
            raise ValueError(f"--variant {variant}: choose one of {', '.join(VARIANTS)}.")
        Config = VARIANTS[variant].Config
        sizes = {"k": 32 if self.k is None else self.k} if "k" in {field.name for field in fields(Config)} else {}
        return Config(d_sae=4096 if self.d_sae is None else self.d_sae, **sizes)


def finetune(
    run: Run,
    training: OmitArgPrefixes[Training],
    new: OmitArgPrefixes[New] = New(),  # noqa: B008 (frozen)
    fvu_weight: Annotated[float, arg(help=_WEIGHT)] = 1.0,
    name: Annotated[str | None, arg(help=_NAME)] = None,
    from_scratch: Annotated[bool, arg(help="Train a new SAE on the texts and the hook of RUN/cache.")] = False,
    model: OwnModel = None,
    texts: OwnTexts = None,
    column: Column = "text",
    dtype: Dtype = None,
) -> None:
    """Train the SAE of RUN further inside its model, so that the model predicts the same with it as without."""
    import saelab
    from saelab.training.finetune import train_end_to_end

    train_config = saelab.TrainConfig(**{field.name: getattr(training, field.name) for field in fields(training)})
    folder, start = _new_folder(run, name) if from_scratch else _beside(run, name)
    if not from_scratch:
        new.refuse()
    read: dict[str, Any] = {"texts": saelab.load_texts(texts, column=column) if texts else None}
    if start is None:
        config, lm = new.config(), load_lm(model or _model_of(run), dtype)
        data: Any = run / "cache"
        train_end_to_end(config, data, lm, train_config, folder, fvu_weight=fvu_weight, hook_name=new.hook_name, **read)
    else:
        sae, lm = with_model(start, model, dtype)
        saelab.finetune(sae, lm, train_config, folder, fvu_weight=fvu_weight, **read)
    print(f"The SAE is in {folder}")
    print(after_training(folder))


def _new_folder(run: Path, name: str | None) -> tuple[Path, None]:
    check_has_cache(run)
    return named_sae(run, name, "sae-end-to-end"), None


def _beside(run: Path, name: str | None) -> tuple[Path, Path]:
    """Where the finetuned SAE goes, and the SAE to finetune: the only one of RUN that this command has not written itself."""
    found = [one.sae_dir for one in runs_of(run)]
    folders = {start: named_sae(start.parent, name, f"{start.name}-finetuned") for start in found}
    starts = [start for start in found if start not in folders.values()]
    if not starts:
        raise ValueError(f"--name {name}: {found[0]} is the SAE to finetune, which is left as it is; use another name.")
    if len(starts) > 1:
        raise ValueError(f"{run} holds {len(starts)} SAEs to finetune; name one of {', '.join(map(str, starts))}")
    return folders[starts[0]], starts[0]


def _model_of(run: Path) -> str:
    """The model that RUN/cache was harvested from."""
    from saelab.activation_cache.reader import ActivationCache

    cache = ActivationCache(run / "cache")
    return cache.origin(cache.hook_names[0])["model"]["name"]


FINETUNE: dict[str, tuple[Callable[..., None], str]] = {
    "finetune": (
        finetune,
        "saelab finetune runs/demo --n-tokens 200_000\n"
        "saelab finetune runs/demo/sae --n-tokens 200_000 --fvu-weight 0 --name kl\n"
        "saelab finetune runs/demo --from-scratch --variant batch_topk --n-tokens 2_000_000",
    )
}
