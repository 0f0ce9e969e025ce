"""The `saelab` command line: which sub-command is meant, what its flags are, and errors as one line."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, arg

from saelab.cli.commands import COMMANDS, Run, StreamFlags, check_has_cache, train
from saelab.cli.messages import shown
from saelab.errors import SaelabError


def _variant(args: Sequence[str]) -> str:
    """The kind of SAE that `args` ask for. Raises `ValueError` for one that there is not, and for another one's flag."""
    from saelab.saes import VARIANTS

    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
    chosen = [after for word, after in itertools.pairwise(words) if word == "--variant"]
    variant = chosen[-1] if chosen else "topk"
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(VARIANTS)}."
        raise ValueError(f"unknown --variant {variant!r}; {hint}")
    flags = {name: _flags(one.Config) for name, one in VARIANTS.items()}
    for word in words:
        owners = [name for name in VARIANTS if word.replace("_", "-") in flags[name]]
        if owners and variant not in owners:
            raise ValueError(
                f"{word} is no flag of {variant} (but of {', '.join(owners)}); {variant} has {', '.join(flags[variant])}: "
                f"saelab train --variant {variant} --help"
            )
    return variant


def _flags(config: type) -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config)]


def _train_arguments(args: Sequence[str]) -> type:
    """A dataclass with the arguments of `train`: the fields of the variant's config and of `TrainConfig` are flags."""
    import saelab

    variant = _variant(args)
    optional = [
        ("variant", Literal[tuple(saelab.VARIANTS)], "Kind of SAE; it decides which config flags there are.", "topk"),
        ("name", str | None, "Write to RUN/sae-NAME instead of RUN/sae.", None),
        ("hook_name", str | None, "Site to train on, where there are several.", None),
        (
            "stream",
            tuple[str, ...],
            "Sites to harvest while training, without a cache; its flags: --stream --help.",
            (),
        ),
        ("wandb_project", str | None, "Log to this project of Weights & Biases as well.", None),
    ]
    fields: list[Any] = [
        ("run", Run),
        ("config", OmitArgPrefixes[saelab.VARIANTS[variant].Config]),
        ("train", OmitArgPrefixes[saelab.TrainConfig]),
    ]
    fields += [("reading", OmitArgPrefixes[StreamFlags])] if _streams(args) else []
    fields += [(name, Annotated[kind, arg(help=text)], default) for name, kind, text, default in optional]
    return dataclasses.make_dataclass("Arguments", fields)


def _streams(args: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--stream" for word in args)


# Flags of which neither leaves the choice to the tokenizer.
_YES_AND_NO = {"--prepend-bos": ["--prepend-bos", "True"], "--no-prepend-bos": ["--prepend-bos", "False"]}
_EPILOG = "saelab COMMAND --help tells more. SAELAB_DEBUG=1 shows where an error came from."


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for an error the user can mend, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    debug, rank = bool(os.environ.get("SAELAB_DEBUG")), int(os.environ.get("RANK", "0"))  # of torchrun
    try:
        with warnings.catch_warnings(), _sigterm_as_ctrl_c(), nullcontext() if rank else shown():
            if not debug:
                warnings.showwarning = _show_warning if not rank else _silent
            return _run(args)
    except KeyboardInterrupt as stopped:
        if rank:  # the first one tells what is kept
            return 130
        kept = f"{stopped}. " if str(stopped) else ""
        print(f"\nInterrupted. {kept}The same command again goes on from what is on disk.", file=sys.stderr)
        return 130
    except Exception as error:
        said = None if debug else explain(error)
        if said is None:
            raise
        print(f"saelab{f' (rank {rank})' if rank else ''}:", " ".join(said.split()), file=sys.stderr)
        return 2


def explain(error: Exception) -> str | None:
    """One line for an error that the user can mend: ours, the system's, or another library's. None for a fault of saelab,
    whose traceback is what helps.
    """
    if isinstance(error, ValueError | SaelabError) and not _is_foreign(error):
        return str(error)
    kind = type(error).__name__
    if isinstance(error, ImportError):
        return f"{error}: install that package (pip install 'saelab[wandb,notebook]' brings the optional ones)."
    if isinstance(error, OSError | MemoryError) or kind == "OutOfMemoryError":
        return f"{kind}: {error}. Check the path, the space that is left on it, and the memory."
    if _is_foreign(error):
        return f"{_raised_in(error)} raised {kind}: {error}. SAELAB_DEBUG=1 shows where."
    return None


def _is_foreign(error: Exception) -> bool:
    return _raised_in(error) not in ("saelab", *sys.stdlib_module_names)


def _raised_in(error: Exception) -> str:
    """The package whose code raised it; code of the standard library counts as its caller's."""
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    return next((name for name in reversed(packages) if name not in sys.stdlib_module_names), "saelab")


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """`kill`, and the end of a batch job, as Ctrl-C: what is begun is kept."""
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
    """Only rank 0 of a job speaks."""


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning as one line, without the place in the code that a user cannot act on."""
    print(f"saelab: {category.__name__}:" if category is not UserWarning else "saelab:", message, file=sys.stderr)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: saelab COMMAND [OPTIONS]\n\nA workbench for sparse autoencoders.\n")
        for name, (function, _) in COMMANDS.items():
            print(f"  {name:<10}{_summary(function)}")
        print(f"\n{_EPILOG}")
        return 0
    if args[0] == "--version":
        import saelab

        print(saelab.__version__)
        return 0
    name, rest = args[0], [part for word in args[1:] for part in _YES_AND_NO.get(word, [word])]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}."
        raise ValueError(f"unknown command {name!r}; {hint}")
    function, examples = COMMANDS[name]
    description = f"{_summary(function)}\n\nExamples:\n" + "".join(f"  {line}\n" for line in examples.split("\n"))
    options: dict[str, Any] = {"prog": f"saelab {name}", "description": description, "args": rest}
    if function is train:
        needs_cache = not _streams(rest)
        if (
            needs_cache
            and rest
            and not any(word.startswith("-") for word in (rest[0], *{"-h", "--help"}.intersection(rest)))
        ):
            check_has_cache(Path(rest[0]))  # before the flags, whose errors would hide that the run is missing
        arguments = tyro.cli(_train_arguments(rest), **options)
        if needs_cache:
            check_has_cache(arguments.run)  # pyright: ignore[reportAttributeAccessIssue]
        train(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)})
    else:
        tyro.cli(function, **options)
    return 0


def _summary(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").partition("\n")[0]
