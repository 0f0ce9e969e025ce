"""The commands that work on what a RUN holds, as lines for a shell: how to train on its cache, and what to do with an SAE. Torch
is imported when a cache is opened."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from saelab.files import read_json

_SIZES = ("--d-sae", 4096, "--k", 32, "--n-tokens", "2_000_000")
_MLP_INPUTS = ("mlp.hook_in", "hook_mlp_in", "ln2.hook_normalized", "hook_resid_mid")


def command(name: str, *words: object) -> str:
    """A `saelab` command as it is typed, with quotes where a shell needs them."""
    return shlex.join(["saelab", name, *map(str, words)])


def one_of(commands: Sequence[str]) -> str:
    """What a command says last: the commands that come next, of which the user runs one."""
    return f"Next: {commands[0]}" if len(commands) == 1 else "\n  ".join(["Next, one of:", *commands])


def trainings(run: Path) -> list[str]:
    """The ways to train on RUN/cache, for what it holds: several hooks, gradients. Raises `CacheError` if it is not finished."""
    config = _cache_config(run)
    hooks: dict[str, int] = config["hooks"]
    found = [
        _train(run, "--variant", "transcoder", "--hook-name", read, "--hook-name-out", output, *_SIZES)
        for read, output in _mlp(list(hooks))
    ]
    if len(hooks) > 1 and len(set(hooks.values())) == 1:
        found.append(_train(run, "--variant", "crosscoder", *_SIZES))
    return [*found, one_hook_training(run, "gradient" if config.get("gradients") else "topk")]


def one_hook_training(run: Path, variant: str, sizes: Sequence[object] = _SIZES) -> str:
    """How to train this variant on one hook of RUN/cache, the last one. Raises `CacheError` if the cache is not finished."""
    *others, last = _cache_config(run)["hooks"]
    which = ("--variant", variant) if variant != "topk" else ()
    return _train(run, *which, *(("--hook-name", last) if others else ()), *sizes)


def after_training(sae_dir: Path) -> str:
    """What to do with a trained SAE: evaluate it, collect its features, compare what a crosscoder reads, look at it."""
    path = sae_dir / "sae.json"
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    seen = ("--allow-train",) if known.get("split", "train") != "train" else ()
    found = [command("eval", sae_dir, *seen), command("features", sae_dir)]
    hooks = known.get("hook_names") or ()
    if known.get("variant") == "crosscoder" and len(hooks) > 1:
        pair = ("--a", hooks[0], "--b", hooks[1]) if len(hooks) > 2 else ()
        found.append(command("diff", sae_dir, *pair, *seen))
    return in_turn(*found, command("dash", sae_dir.parent))


def in_turn(*commands: str) -> str:
    """What a command says last: the commands that come next, each after the other."""
    return f"Next: {'; '.join(commands)}"


def check_is_run(run: Path) -> None:
    """Raise `ValueError` for the folder of an SAE, where a RUN is needed."""
    if (run / "sae.json").exists():
        raise ValueError(f"{run} is an SAE, and this needs the RUN that it is in: {run.parent}.")


def check_has_cache(run: Path, otherwise: str = "") -> None:
    """Raise `ValueError` with the command that makes one, or what to do `otherwise`, if RUN has no cache."""
    check_is_run(run)
    if not (run / "cache").is_dir():
        create = f"{command('harvest', run)} --hook-name HOOK --n-tokens NUMBER"
        raise ValueError(f"{run} holds no cache; create one: {create}{otherwise}")


def _cache_config(run: Path) -> dict[str, Any]:
    from saelab.activation_cache.layout import read_manifest

    return read_manifest(run / "cache")["config"]


def _train(run: Path, *words: object) -> str:
    """A training beside the SAEs that are there already."""
    names = (f"sae-{number}" for number in count(2))
    name = () if not (run / "sae").exists() else ("--name", next(n for n in names if not (run / n).exists())[4:])
    return command("train", run, *name, *words)


def _mlp(hooks: Sequence[str]) -> list[tuple[str, str]]:
    """The input and the output of the first MLP of which both are there: what a transcoder reads and predicts."""
    pairs = [
        (f"{block}{read}", output)
        for output in hooks
        if (block := output.removesuffix("hook_mlp_out")) != output
        for read in _MLP_INPUTS
    ]
    return [(read, output) for read, output in pairs if read in hooks][:1]
