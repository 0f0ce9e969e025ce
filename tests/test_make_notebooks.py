"""`docs/make_notebooks.py`: notebooks run in an empty folder with a copy of the run, and keep only what is worth keeping."""

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

SCRIPT = Path(__file__).parent.parent / "docs" / "make_notebooks.py"
CELL = """
import sys
from pathlib import Path
print("noise", file=sys.stderr)
print(*sorted(path.name for path in Path("runs/demo/features").iterdir()), sorted(path.name for path in Path().iterdir()))
Path("runs/demo/features/more").touch()
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_notebook_runs_beside_a_copy_of_the_run(script, tmp_path):
    run = tmp_path / "given"
    (run / "features").mkdir(parents=True)
    for name in ("features/store.sqlite", "features/state.safetensors", "annotations.sqlite", "report.json"):
        (run / name).touch()
    path = tmp_path / "one.ipynb"
    path.write_text(nbformat.writes(new_notebook(cells=[new_code_cell(CELL)])), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    done = nbformat.reads(script.kept(script.executed(path, run, tmp_path / "empty")), as_version=4)
    (output,) = done.cells[0].outputs
    assert output.text == "store.sqlite ['runs']\n"
    assert done.cells[0].execution_count == 1 and done.cells[0].id == "cell-0" and not done.cells[0].metadata
    assert not (run / "features" / "more").exists()


def test_outputs_that_tell_of_the_machine_or_are_too_large_are_refused(script):
    def with_text(text: str):
        return new_notebook(cells=[new_code_cell("1", outputs=[new_output("stream", text=text)])])

    assert "in runs/demo" in script.kept(with_text("in runs/demo"))
    with pytest.raises(SystemExit, match="tell of this machine"):
        script.kept(with_text(f"in {Path.cwd()}/runs/demo"))
    with pytest.raises(SystemExit, match=r"has 3\d\d,\d\d\d bytes, more than 300,000"):
        script.kept(with_text("x" * 300_000))


def test_progress_bars_are_left_out_and_cards_stay(script):
    given = [
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}),
        new_output("stream", text="one\n"),
        new_output("stream", name="stderr", text="bar"),
        new_output("stream", text="two\n"),
        new_output("display_data", {"text/html": "<b>card</b>"}, metadata={"a": 1}),
    ]
    lines, kept = script.outputs(given)
    assert lines.text == "one\ntwo\n"
    assert kept.data == {"text/html": "<b>card</b>"} and kept.metadata == {}
