"""Every script and notebook in examples/ runs as it stands, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_all_examples_are_covered():
    found = {path.name for pattern in ("*.py", "*.ipynb") for path in EXAMPLES.glob(pattern)}
    assert found == {"train_relu.py", "steering.ipynb", "steering_effect.py"}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path


@pytest.mark.timeout(600)
def test_train_relu(tmp_path):
    script = EXAMPLES / "train_relu.py"
    done = subprocess.run([sys.executable, script, "run"], cwd=tmp_path, check=True, capture_output=True, text=True)
    measures = [line for line in done.stdout.splitlines() if " fvu " in line]
    assert [line.split()[0] for line in measures] == ["relu", "topk"]
    assert all(0.0 < float(line.split()[2]) < 0.7 for line in measures), measures
    assert (tmp_path / "run" / "sae-relu-1024-l32" / "sae.json").exists()


@pytest.mark.timeout(600)
def test_steering_notebook_and_table(tmp_path):
    notebook = nbformat.read(EXAMPLES / "steering.ipynb", as_version=4)
    environment = {
        **os.environ,
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
    }
    client = NotebookClient(notebook, timeout=550, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    default, steered = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("default:", "steered:")
    )
    assert default.removeprefix("default:") != steered.removeprefix("steered:")
    assert any("text/html" in output.get("data", {}) for output in outputs), "the feature card is HTML"

    script = [sys.executable, EXAMPLES / "steering_effect.py", "runs/steering"]
    done = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "Above the mean: " in done.stdout and "above the maximum: " in done.stdout and "Failures" in done.stdout
