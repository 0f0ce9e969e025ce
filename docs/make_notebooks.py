"""Runs the notebooks of examples/ again, with the demo's run, and keeps what they put out in the files.

    python docs/make_notebooks.py runs/demo
    python docs/make_notebooks.py runs/demo steering concept_to_steer

Each runs in an empty folder with a copy of the run, which stays as it was; all seven take about 40 minutes on two cores. Of the
outputs, progress bars and the library's messages are left out. A file changes only where the notebook or its results did.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
MAX_BYTES = 300_000
_COPIED = ("sae", "features", "steering", "report.json")
"""What the notebooks read of the run; its annotations would be those of whoever made it."""
_LEFT_OUT = "application/vnd.jupyter.widget-view+json"


def main() -> None:
    """Run the notebooks that are named, or all."""
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of `saelab demo`")
    parser.add_argument("notebooks", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all if none is named")
    arguments = parser.parse_args()
    if unknown := set(arguments.notebooks) - set(names):
        parser.error(f"no notebook is called {', '.join(sorted(unknown))}")
    for name in arguments.notebooks or names:
        path = NOTEBOOKS / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, arguments.run, Path(folder))
        text = kept(notebook)
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(text.encode()):,} bytes")


def executed(path: Path, run: Path, folder: Path) -> Any:
    """The notebook with the outputs of a run in `folder`."""
    copy_run(run, folder / "work" / "runs" / "demo")
    notebook: Any = nbformat.read(path, as_version=4)
    own = {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
    client = NotebookClient(
        notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": folder / "work"}}
    )
    client.execute(env=os.environ | own)
    return notebook


def copy_run(run: Path, to: Path) -> None:
    """Copy what the notebooks read; of the features not the collector's state, which is the largest file."""
    to.mkdir(parents=True)
    for one in (run / name for name in _COPIED):
        if one.is_dir():
            shutil.copytree(
                one, to / one.name, ignore=shutil.ignore_patterns("state.safetensors", "checkpoints", ".lock")
            )
        elif one.exists():
            shutil.copy(one, to)


def kept(notebook: Any) -> str:
    """The text of the file. Raises `SystemExit` if it would be too large, or tell of this machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = {}, f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = list(outputs(cell.outputs))
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise SystemExit(f"The notebook has {len(text.encode()):,} bytes, more than {MAX_BYTES:,}: show less.")
    if told := [word for word in machine() if word in text]:
        raise SystemExit(f"The outputs tell of this machine: {', '.join(told)}.")
    return text


def outputs(given: Sequence[Any]) -> Iterator[Any]:
    """Those worth keeping; lines that were printed one after the other as one output."""
    last: Any = None
    for one in given:
        is_text = one.output_type == "stream"
        if (is_text and one.name == "stderr") or _LEFT_OUT in one.get("data", {}):
            continue
        if is_text and last is not None:
            last.text += one.text
            continue
        if not is_text:
            one.metadata = {}
        last = one if is_text else None
        yield one


def machine() -> set[str]:
    """Words that only this machine knows."""
    words = {str(Path.home()), str(Path.cwd()), str(NOTEBOOKS.parent.parent), tempfile.gettempdir() + "/"}
    return words | {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5}


if __name__ == "__main__":
    main()
