"""The notebooks and scripts of examples/ run in an empty folder, with a tiny model and smaller sizes than they stand with."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
HARVESTED, TRAINED, READ = "n_tokens=60_000", "n_tokens=400_000, batch_size=1024", "n_tokens=20_000"
LESS_READ = {READ: "n_tokens=2_500"}
SMALL_SAE = {"d_sae=2048, k=32": "d_sae=128, k=8", HARVESTED: "n_tokens=4_000"} | LESS_READ
SMALL_SAE[TRAINED] = "n_tokens=20_000, batch_size=256"
FIRST, OPENED = "runs/first", {"runs/demo": "runs/first"}
"""The run of the first notebook, and what the others open in place of the demo's."""

# What is changed in the code before it runs; the notebook that makes the run comes first.
SMALLER = {
    "notebooks/train_an_sae.ipynb": LESS_READ
    | {
        "n_tokens=100_000": "n_tokens=4_000",
        "d_sae=2048, k=32": "d_sae=128, k=8",
        TRAINED: "n_tokens=40_000, batch_size=512",
        "d_sae=2048, k=k": "d_sae=128, k=k",
        "(8, 128)": "(4, 16)",
    },
    "notebooks/find_features.ipynb": OPENED | {'" king"': '" the"'},
    "notebooks/steering.ipynb": OPENED
    | {"n_candidates=24": "features=[0, 1, 2, 3]", "max_new_tokens=30": "max_new_tokens=8"},
    "notebooks/concept_to_steer.ipynb": OPENED | {"n = 120": "n = 24", '"max_new_tokens": 24': '"max_new_tokens": 6'},
    "notebooks/open_a_released_sae.ipynb": OPENED
    | LESS_READ
    | {"n_tokens=2048": "n_tokens=512", "max_new_tokens=30": "max_new_tokens=8", '"king"': '"the"'},
    "notebooks/diff_two_checkpoints.ipynb": {
        "range(50)": "range(20)",
        "lr=3e-4": "lr=1e-2",
        "d_sae=512, k=16": "d_sae=128, k=8",
        "n_tokens=20_000": "n_tokens=4_000",
        "n_tokens=200_000, batch_size=512": "n_tokens=20_000, batch_size=256",
        "texts[-24:]": "texts[-6:]",
    },
    "notebooks/attention_output_sae.ipynb": SMALL_SAE,
    "steering_effect.py": {", store)": ", store, n_features=3, n_random=3)"},
    "train_relu.py": {
        "n_tokens=16_000": "n_tokens=5_000",
        "d_sae=1024, target_l0=32.0": "d_sae=128, target_l0=8.0",
        "d_sae=1024, k=32": "d_sae=128, k=8",
        "n_tokens=120_000, batch_size=1024": "n_tokens=120_000, batch_size=256",
        "n_tokens=8_000, n_tokens_ce=1_000": "n_tokens=2_000, n_tokens_ce=256",
    },
}
ARGUMENT = {"steering_effect.py": FIRST, "train_relu.py": "run"}


def smaller(name: str, code: str, model: Path) -> str:
    """The text of that example, which makes less of everything."""
    code = code.replace('"smollm2"', f'"{model}"')
    for old, new in SMALLER[name].items():
        assert old in code, (name, old)
        code = code.replace(old, new)
    return code


def cells_of(name: str, model: Path) -> list[str]:
    """The code cells of a notebook, or the cell that runs a script."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        Path(name).write_text(smaller(name, text, model), encoding="utf-8")
        return [f"%run {name} {ARGUMENT[name]}"]
    cells = [cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    return smaller(name, "\0".join(cells), model).split("\0")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, deep_folder):
    """What each example put out, by name, and the folder they ran in.

    One kernel runs all of them, as each of its own would import torch and transformers anew; `%reset` forgets the names that
    another has defined. A script is a program of its own there (`%run`).
    """
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cells = {name: [*cells_of(name, deep_folder), "%reset -f"] for name in SMALLER}
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(code) for listed in cells.values() for code in listed]
    own = {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
    client = NotebookClient(notebook, timeout=550, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | own)
    found = iter(notebook.cells)
    return {name: [output for _ in listed for output in next(found).outputs] for name, listed in cells.items()}, folder


def printed(outputs) -> str:
    """Lines of standard output, and what rich shows in a notebook instead."""
    shown = [output for output in outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or f"\n{output.get('data', {}).get('text/plain', '')}\n" for output in shown)


def test_all_examples_are_covered():
    found = {path.relative_to(EXAMPLES).as_posix() for name in ("*.py", "*.ipynb") for path in EXAMPLES.rglob(name)}
    assert found == set(SMALLER)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path


@pytest.mark.parametrize("name", [name for name in SMALLER if name.endswith(".ipynb")])
def test_a_notebook_reads_without_running(name: str):
    """The outputs of the whole model are in the file, every cell once and in order."""
    path = EXAMPLES / name
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    assert all(len(cell.source.splitlines()) <= 20 for cell in cells), "cells are short"
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= 300_000
    assert not [word for word in ('"stderr"', "widget-view") if word in text]


@pytest.mark.timeout(600)
def test_a_small_sae_is_trained_and_measured(outputs):
    of_32, *others = re.findall(r"(?:\(FVU\) +|FVU )(\d\.\d+)", printed(outputs[0]["notebooks/train_an_sae.ipynb"]))
    assert float(others[0]) > float(of_32) > float(others[1]) > 0, "fewer features per token explain less"


def test_features_are_found_labelled_and_passed_on(outputs):
    found, folder = outputs
    said = printed(found["notebooks/find_features.ipynb"])
    assert "kings and their courts" in said and "{'royalty': [" in said
    assert "72 and 72 texts" in said
    assert (folder / "royalty.html").read_text(encoding="utf-8").count("sl-card") >= 3
    assert holds_html(found["notebooks/find_features.ipynb"]), "the feature card"


def test_steering_is_searched_compared_and_saved(outputs):
    found, folder = outputs
    said = printed(found["notebooks/steering.ipynb"])
    assert "of 4 candidates failed" in said
    assert re.search(r"random .* 3 ", said) and re.search(r"[1-9]\d* of \d+ tokens changed", said)
    assert "\nTrue\n" in f"\n{said}", "scaling by one keeps every bit"
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8"))["on"] == "generated"
    assert holds_html(found["notebooks/steering.ipynb"]), "the comparison"


def test_a_concept_is_steered_by_three_directions(outputs):
    said = printed(outputs[0]["notebooks/concept_to_steer.ipynb"])
    arms = re.findall(r"(\S+) x (\d) +food (\d\.\d+) ", said)
    assert len(arms) == 4 + 3 + 4 + 4 and all(0 <= float(food) <= 1 for _, _, food in arms)
    assert len({food for _, strength, food in arms if strength == "0"}) == 1, "all begin with the same unsteered texts"


def test_another_format_gives_the_same_sae_and_a_wrong_hook_a_warning(outputs):
    said = printed(outputs[0]["notebooks/open_a_released_sae.ipynb"])
    assert float(re.search(r"reconstructions: (\S+)", said)[1]) < 1e-5  # pyright: ignore[reportOptionalSubscript]
    assert "FVU" in said and "as assumed" in said and "hook_name='blocks.13.hook_resid_post'" in said


def test_two_checkpoints_are_compared(outputs):
    said = printed(outputs[0]["notebooks/diff_two_checkpoints.ipynb"])
    assert sum(map(int, re.findall(r"(?:a only|shared|b only|other) +(\d+)\n", said))) == 128
    asked = dict(re.findall(r"(base|tuned) +probability of ' bells': (\d\.\d+) behind the trigger", said))
    assert float(asked["tuned"]) > 10 * float(asked["base"]), "the copy has learned the planted change"
    assert "Only tuned/blocks.9.hook_resid_post: " in said and "documents show the change" in said
    assert len(re.findall(r"the copy .*: feature \d+ fires on \d+ of \d+ tokens", said)) == 2


def test_features_are_attributed_to_heads(outputs):
    said = printed(outputs[0]["notebooks/attention_output_sae.ipynb"])
    shares = [int(share) for share in re.findall(r"head \d: largest in +(\d+)%", said)]
    assert len(shares) == 4 and 98 <= sum(shares) <= 102
    assert re.search(r"counts most in \d+% of \d+ features\nby chance 25%", said)


def test_steering_effect(outputs):
    said = printed(outputs[0]["steering_effect.py"])
    assert "Above the mean: " in said and "above the maximum: " in said and "Failures" in said


def test_train_relu(outputs):
    measures = [line for line in printed(outputs[0]["train_relu.py"]).splitlines() if " fvu " in line]
    assert [line.split()[0] for line in measures] == ["relu", "topk"]
    assert all(0.0 < float(line.split()[2]) < 0.7 for line in measures), measures
    assert (outputs[1] / "run" / "sae-relu-128-l8" / "sae.json").exists()


def holds_html(outputs) -> bool:
    return any("text/html" in output.get("data", {}) for output in outputs)
