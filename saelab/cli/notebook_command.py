"""`saelab notebooks`: the example notebooks, as files to open."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from saelab.files import atomic_write_text


def notebooks(
    folder: Annotated[
        Positional[Path], arg(metavar="FOLDER", help="Where to write them: beside runs/demo, if you have it.")
    ] = Path(),
) -> None:
    """Write the example notebooks to FOLDER and say how to open them; a notebook that is there already is left alone."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"FOLDER={folder} is a file; name a folder, or leave it out for this one.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _notebooks().items():
        _write(folder / name, text)
    print("\nOpen them with:")
    for line in _commands(folder):
        print(f"  {line}")


def _notebooks() -> dict[str, str]:
    """Name and text of each."""
    source = Path(str(resources.files("saelab") / "notebooks"))
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(source.glob("*.ipynb"))}


def _write(path: Path, text: str) -> None:
    if not path.exists():
        atomic_write_text(path, text)
        print(path)
    elif path.read_text(encoding="utf-8") == text:
        print(f"{path} is there already")
    else:
        print(f"{path} is there already and differs: left as it is")


def _commands(folder: Path) -> list[str]:
    """What is left to do, in order."""
    steps = [] if folder == Path() else [f"cd {shlex.quote(str(folder))}"]
    if find_spec("jupyterlab") is None:
        steps.append("pip install 'saelab[notebook]'")
    if not (folder / "runs" / "demo" / "features").exists():
        steps.append("saelab demo --no-serve  # the run that most of them open, in runs/demo")
    return [*steps, "jupyter lab"]


NOTEBOOKS: dict[str, tuple[Callable[..., None], str]] = {
    "notebooks": (notebooks, "saelab notebooks\nsaelab notebooks examples"),
}
