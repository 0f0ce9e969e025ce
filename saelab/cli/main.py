"""The `saelab` command line: dispatches sub-commands, builds their flags, and prints errors as one line."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, arg

from saelab.cli import commands
from saelab.cli.absorption_command import ABSORPTION
from saelab.cli.bench_commands import BENCHES
from saelab.cli.commands import Run, StreamFlags, train
from saelab.cli.diff_command import DIFF
from saelab.cli.feature_commands import FEATURES
from saelab.cli.find_command import FIND
from saelab.cli.finetune_command import FINETUNE
from saelab.cli.interop_commands import INTEROP
from saelab.cli.messages import shown
from saelab.cli.notebook_command import NOTEBOOKS
from saelab.cli.probe_command import PROBE
from saelab.cli.serving_commands import SERVING
from saelab.cli.similarity_command import SIMILARITY
from saelab.cli.steer_command import STEER
from saelab.cli.train_presets import apply_preset
from saelab.errors import explain
from saelab.hints.next_commands import check_has_cache, command

COMMANDS = commands.COMMANDS | FINETUNE | STEER | FEATURES | FIND | DIFF | INTEROP | PROBE | ABSORPTION | SIMILARITY
COMMANDS |= SERVING | NOTEBOOKS


def _variant(args: Sequence[str]) -> str:
    """The SAE variant that `args` ask for. Raises `ValueError` for an unknown variant or a flag of another variant."""
    from saelab.saes import VARIANTS

    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
    chosen = [after for word, after in itertools.pairwise(words) if word == "--variant"]
    variant = chosen[-1] if chosen else "topk"
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(VARIANTS)}."
        raise ValueError(f"unknown --variant {variant!r}; {hint}")
    flags = {name: _flags(one.Config) for name, one in VARIANTS.items()}
    for word in words:
        owners = [name for name in VARIANTS if word.replace("_", "-") in flags[name]]
        if owners and variant not in owners:
            raise ValueError(
                f"{word} is not a flag of {variant} (only of {', '.join(owners)}); {variant} has {', '.join(flags[variant])}: "
                f"saelab train --variant {variant} --help"
            )
    return variant


def _flags(config: type) -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config)]


def _train_arguments(args: Sequence[str]) -> type:
    """A dataclass of the arguments of `train`, with the fields of the variant's config and of `TrainConfig` as flags."""
    import saelab
    from saelab.presets import Preset

    variant = _variant(args)
    optional = [
        ("variant", Literal[tuple(saelab.VARIANTS)], "SAE variant; determines which config flags exist.", "topk"),
        (
            "preset",
            Preset | None,
            "Settings of a paper, where no flag says otherwise: k_sparse (topk), fast (relu, jumprelu).",
            None,
        ),
        ("name", str | None, "Write to RUN/sae-NAME instead of RUN/sae.", None),
        ("hook_name", str | None, "Hook to train on, if the cache holds several.", None),
        ("control", Path | None, "RUN whose cache normalize=whiten whitens by; None: the rows trained on.", None),
        (
            "stream",
            Annotated[tuple[str, ...], arg(help_behavior_hint="(default: none)")],
            "Hooks to harvest while training, without a cache; for more flags see --stream --help.",
            (),
        ),
        ("wandb_project", str | None, "Also log to this Weights & Biases project.", None),
    ]
    config = saelab.VARIANTS[variant].Config
    fields: list[Any] = [
        ("run", Run),
        ("config", OmitArgPrefixes[config], field(default_factory=lambda: config(d_sae=4096))),
        ("train", OmitArgPrefixes[saelab.TrainConfig], field(default_factory=lambda: saelab.TrainConfig(2_000_000))),
    ]
    fields += [("reading", OmitArgPrefixes[StreamFlags], StreamFlags())] if _streams(args) else []
    fields += [(name, Annotated[kind, arg(help=text)], default) for name, kind, text, default in optional]
    return dataclasses.make_dataclass("Arguments", fields)


def _streams(args: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--stream" for word in args)


# Aliases of a three-valued flag: with neither, the tokenizer decides.
_YES_AND_NO = {"--prepend-bos": ["--prepend-bos", "True"], "--no-prepend-bos": ["--prepend-bos", "False"]}
_EPILOG = "Run saelab COMMAND --help for details. SAELAB_DEBUG=1 shows the traceback of an error."


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for an error the user can fix, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    debug, rank = bool(os.environ.get("SAELAB_DEBUG")), int(os.environ.get("RANK", "0"))  # set by torchrun
    try:
        with warnings.catch_warnings(), _sigterm_as_ctrl_c(), nullcontext() if rank else shown():
            if not debug:
                warnings.showwarning = _show_warning if not rank else _silent
            return _run(args)
    except KeyboardInterrupt as stopped:
        if rank:  # rank 0 reports what was saved
            return 130
        kept = f"{stopped}. " if str(stopped) else ""
        print(f"\nInterrupted. {kept}Repeat the same command to resume from what is on disk.", file=sys.stderr)
        return 130
    except Exception as error:
        said = None if debug else explain(error)
        if said is None:
            raise
        from saelab.features.visible import visible

        print(f"saelab{f' (rank {rank})' if rank else ''}:", visible(" ".join(said.split())), file=sys.stderr)
        return 2


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM (`kill`, the end of a batch job) as Ctrl-C, so that progress is saved."""
    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _silent(*_: Any) -> None:
    """Show no warning: only rank 0 of a job prints."""


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print a warning as one line, without its source location, which a user cannot act on."""
    from saelab.features.visible import visible_lines

    kind = "saelab:" if category is UserWarning else f"saelab: {category.__name__}:"
    print(kind, visible_lines(str(message)), file=sys.stderr)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: saelab COMMAND [OPTIONS]\n\nA workbench for sparse autoencoders.\n")
        for name, (function, _) in COMMANDS.items():
            print(f"  {name:<12}{_summary(function)}")
        print(f"\n{_EPILOG}")
        return 0
    if args[0] == "--version":
        import saelab

        print(saelab.__version__)
        return 0
    name, rest = args[0], [part for word in args[1:] for part in _YES_AND_NO.get(word, [word])]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}."
        raise ValueError(f"unknown command {name!r}; {hint}")
    function, examples = COMMANDS[name]
    description = f"{_summary(function)}\n\nExamples:\n" + "".join(f"  {line}\n" for line in examples.split("\n"))
    options: dict[str, Any] = {"prog": f"saelab {name}", "description": description, "args": rest}
    if function is train:
        _train(rest, options)
    elif name == "bench" and rest and rest[0] in BENCHES:  # without tyro's "[SYNTHETIC OPTIONS]"
        bench, text = BENCHES[rest[0]]
        tyro.cli(bench, prog=f"saelab bench {rest[0]}", description=text, args=rest[1:]).run()
    else:
        tyro.cli(function, **options)
    return 0


def _train(args: list[str], options: dict[str, Any]) -> None:
    needs_cache = not _streams(args)
    asks_for_help = bool({"-h", "--help"}.intersection(args))
    if needs_cache and args and not args[0].startswith("-") and not asks_for_help:
        _check_has_cache(Path(args[0]))  # before parsing flags, whose errors would hide the missing run
    arguments: Any = tyro.cli(_train_arguments(args), **options)
    if needs_cache:
        _check_has_cache(arguments.run)
    if arguments.preset is not None:
        apply_preset(arguments, args)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    train(**{name: value for name, value in given.items() if name != "preset"})


def _check_has_cache(run: Path) -> None:
    check_has_cache(run, f"; or train without one: {command('train', run)} --stream HOOK")


def _summary(function: Callable[..., None]) -> str:
    """The first sentence of its docstring, on one line."""
    text = " ".join((function.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]
