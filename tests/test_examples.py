"""The notebook and every script of examples/ run in an empty folder, with a tiny model and smaller sizes than they stand with."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"

# What is changed in the code before it runs.
SMALLER = {
    "steering.ipynb": {
        "n_tokens=25_000": "n_tokens=3_000",
        "d_sae=1024, k=32": "d_sae=128, k=8",
        "n_tokens=200_000, batch_size=1024": "n_tokens=40_000, batch_size=512",
        "n_tokens=20_000": "n_tokens=2_500",
        "max_new_tokens=30": "max_new_tokens=8",
    },
    "steering_effect.py": {", store)": ", store, n_features=3, n_random=3)"},
    "train_relu.py": {
        "n_tokens=16_000": "n_tokens=5_000",
        "d_sae=1024, target_l0=32.0": "d_sae=128, target_l0=8.0",
        "d_sae=1024, k=32": "d_sae=128, k=8",
        "n_tokens=120_000, batch_size=1024": "n_tokens=120_000, batch_size=256",
        "n_tokens=8_000, n_tokens_ce=1_000": "n_tokens=2_000, n_tokens_ce=256",
    },
}


def smaller(name: str, model: Path) -> str:
    """The text of that example, which makes less of everything."""
    code = (EXAMPLES / name).read_text(encoding="utf-8").replace("smollm2", str(model))
    for old, new in SMALLER[name].items():
        assert old in code, (name, old)
        code = code.replace(old, new)
    return code


def test_all_examples_are_covered():
    found = {path.name for pattern in ("*.py", "*.ipynb") for path in EXAMPLES.glob(pattern)}
    assert found == set(SMALLER)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, deep_folder):
    """What the notebook put out, then what each script printed; and the folder they ran in.

    The scripts run in the notebook's kernel, each as a program of its own (`%run`): in another process each would import
    torch and transformers anew.
    """
    folder = tmp_path_factory.mktemp("examples")
    notebook = nbformat.reads(smaller("steering.ipynb", deep_folder), as_version=4)
    for name, run in (("steering_effect.py", "runs/steering"), ("train_relu.py", "run")):
        (folder / name).write_text(smaller(name, deep_folder), encoding="utf-8")
        notebook.cells.append(nbformat.v4.new_code_cell(f"%run {name} {run}"))
    own = {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
    client = NotebookClient(notebook, timeout=550, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | own)
    *cells, effect, relu = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [output for outputs in cells for output in outputs], printed(effect), printed(relu), folder


def printed(outputs) -> str:
    """Lines of standard output, and what rich shows in a notebook instead."""
    shown = [output for output in outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or f"\n{output.get('data', {}).get('text/plain', '')}\n" for output in shown)


@pytest.mark.timeout(600)
def test_steering_notebook(outputs):
    found = outputs[0]
    lines = printed(found).splitlines()
    default, steered = (next(line for line in lines if line.startswith(name)) for name in ("default:", "steered:"))
    assert default.removeprefix("default:") != steered.removeprefix("steered:")
    assert any("text/html" in output.get("data", {}) for output in found), "the feature card is HTML"


def test_steering_effect(outputs):
    said = outputs[1]
    assert "Above the mean: " in said and "above the maximum: " in said and "Failures" in said


def test_train_relu(outputs):
    measures = [line for line in outputs[2].splitlines() if " fvu " in line]
    assert [line.split()[0] for line in measures] == ["relu", "topk"]
    assert all(0.0 < float(line.split()[2]) < 0.7 for line in measures), measures
    assert (outputs[3] / "run" / "sae-relu-128-l8" / "sae.json").exists()
