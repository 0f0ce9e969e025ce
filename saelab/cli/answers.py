"""What a command answers: text for a reader or, with --json, one JSON object on standard output and nothing else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

from tyro.conf import arg

from saelab.cli.messages import on_stderr

AsJson = Annotated[bool, arg(name="json", help="Print one JSON object on standard output and nothing else.")]


@contextmanager
def answering(as_json: bool) -> Iterator[Callable[..., None]]:
    """Yield `answer(data, *shown)`, which prints `shown` (lines and rich tables) or, for JSON, `data` once the block has ended
    without an error; whatever else is printed in it then goes to standard error."""
    if not as_json:
        yield lambda _, *shown: show(*shown)
        return
    answers: list[Mapping[str, Any]] = []
    with on_stderr(), redirect_stdout(sys.stderr):
        yield lambda data, *_: answers.append(data)
    for data in answers:  # one; none in a process that shares the work of another
        print(json.dumps(_json(data), allow_nan=False))


def show(*shown: Any) -> None:
    """Print lines and rich tables. Lines hold text of models and users: no character of it commands the terminal."""
    for one in shown:
        if isinstance(one, str):
            from saelab.features.visible import visible_lines

            print(visible_lines(one))
            continue
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=200)  # output to a file has no terminal width
        console.print(one)


def _json(value: Any) -> Any:
    """`value` as JSON holds it: paths and others as text, NumPy's numbers as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json(one) for one in value]
    if hasattr(value, "tolist"):
        return _json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
