"""A RUN as the Runs page and notebooks read it: rows of its SAEs, curves that keep their ends, whether training is running."""

import json
import re
from pathlib import Path

import pytest

from saelab.cli.main import main
from saelab.errors import SaelabError
from saelab.files import is_locked, locked
from saelab.run_folder import summary, training
from saelab.run_folder.curves import curve, read_metrics
from saelab.run_folder.summary import ordered, scored_apart
from saelab.runs import find_saes, named_sae, sae_run


@pytest.mark.parametrize("n", [0, 1, 2, 399, 400, 401, 800, 1001, 12_345])
@pytest.mark.parametrize("torn", [False, True])
def test_a_thinned_curve_keeps_its_first_and_last_point(tmp_path, n, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(n)) + ('{"st' if torn else ""))
    steps = [point["step"] for point in read_metrics(path)]
    assert len(steps) == min(n, 400) and steps == sorted(set(steps))
    assert not n or (steps[0], steps[-1]) == (0, n - 1)


def test_a_curve_leaves_out_what_is_not_finite():
    lines = [{"tokens": 1, "fvu": None}, {"tokens": None, "fvu": 1.0}, {"tokens": 2, "fvu": float("nan")}, {"fvu": 3.0}]
    assert curve([*lines, {"tokens": 5, "fvu": 0.5}, {"tokens": 6, "fvu": True}], "fvu") == [(5, 0.5)]
    assert read_metrics(Path("nowhere")) == []


def test_one_row_says_what_an_sae_is_and_scored(hostile_run):
    (sae,) = find_saes(hostile_run)
    row, report = summary(sae), json.loads((hostile_run / "report.json").read_text())
    assert (row.name, row.variant, row.d_sae, row.sparsity) == ("sae", "topk", 96, ("k", 4.0))
    assert row.hook_name == "blocks.1.hook_resid_post" and row.model and not row.faults
    assert (row.fvu, row.l0, row.n_tokens) == (report["fvu"], report["l0"], report["n_tokens"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 8}, ("k", 8.0)),
        ({"l1_coefficient": 2.0, "target_l0": None}, ("l1", 2.0)),
        ({"l1_coefficient": 2.0, "target_l0": 32}, ("target L0", 32.0)),
        ({"sparsity_coefficient": 1e-3}, ("sparsity", 1e-3)),
        ({"k": 8, "l1_coefficient": 2.0, "sparsity": "l1"}, ("l1", 2.0)),
        ({"k": 8, "l1_coefficient": 2.0, "sparsity": "batch_topk"}, ("k", 8.0)),
        ({"k": "many"}, None),
    ],
)
def test_the_setting_that_makes_it_sparse(tmp_path, settings, said):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "sae.json").write_text(json.dumps({"variant": "v", "config": settings}))
    assert summary(sae_run(tmp_path / "sae")).sparsity == said


def _three(folder):
    for name, fvu, n in (("a", 0.3, 100), ("b", None, 100), ("c", 0.1, 50)):
        (folder / f"sae-{name}").mkdir()
        (folder / f"sae-{name}" / "sae.json").write_text("{}")
        if fvu is not None:
            (folder / f"report-{name}.json").write_text(json.dumps({"fvu": fvu, "n_tokens": n}))
    return [summary(sae) for sae in find_saes(folder)]


def test_rows_are_ordered_and_those_without_a_value_come_last(tmp_path):
    rows = _three(tmp_path)
    assert [row.name for row in ordered(rows, "fvu")] == ["sae-c", "sae-a", "sae-b"]
    assert [row.name for row in ordered(rows, "fvu", descending=True)] == ["sae-a", "sae-c", "sae-b"]
    assert [row.name for row in ordered(rows, "name", descending=True)] == ["sae-c", "sae-b", "sae-a"]
    assert scored_apart(rows) == [50, 100] and scored_apart(rows[:2]) == []
    with pytest.raises(ValueError, match="by='config' is no column; there are name, variant"):
        ordered(rows, "config")


def test_altered_files_are_left_out_and_said(tmp_path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "sae.json").write_text('{"variant": 3, "d_sae": true, "config": [], "models": 1, "model": "x"}')
    (tmp_path / "report.json").write_text("[1]")
    row = summary(sae_run(tmp_path / "sae"))
    assert (row.variant, row.d_sae, row.sparsity, row.model, row.fvu) == (None, None, None, None, None)
    assert len(row.faults) == 1 and "holds a list, expected an object" in row.faults[0]


def test_whether_training_is_running(tmp_path):
    home = tmp_path / "sae" / "checkpoints"
    home.mkdir(parents=True)
    began = {
        "variant": "topk",
        "config": {"d_sae": 64, "k": 3},
        "train": {"n_tokens": "60_000"},
        "data": "cache abc h.1",
    }
    (home / "run.json").write_text(json.dumps(began))
    lines = [{"tokens": 256, "fvu": 1.0}, {"tokens": 512, "fvu": 0.5, "tokens_per_second": 1e4}]
    (tmp_path / "sae" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"to')
    (sae,) = find_saes(tmp_path)
    assert training(sae)[:4] == ("stopped", 512, 60_000, 1e4)
    with locked(home, "busy"):
        assert is_locked(home) and training(sae).state == "running"
    assert not is_locked(home) and not is_locked(tmp_path)
    row = summary(sae)
    assert (row.variant, row.d_sae, row.sparsity, row.hook_name) == ("topk", 64, ("k", 3.0), "h.1")
    (tmp_path / "sae" / "sae.json").write_text("{}")
    assert training(sae).state == "ended"


def test_a_lock_is_shared_by_readers_and_kept_from_writers(tmp_path):
    def refused(shared: bool) -> bool:
        try:
            with locked(tmp_path, "busy", shared=shared):
                return False
        except SaelabError as error:
            return str(error) == "busy"

    with locked(tmp_path, "busy", shared=True):
        assert refused(shared=False) and not refused(shared=True)
    with locked(tmp_path, "busy"):
        assert refused(shared=False) and refused(shared=True)
    assert not refused(shared=False)


@pytest.mark.parametrize("name", ["", "../y", "a/b", ".x", "-x", "a b"])
def test_a_name_is_part_of_a_file_name(name, tmp_path):
    (tmp_path / "cache").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"--name {name!r} must be letters")):
        named_sae(tmp_path, name)
    assert main(["train", str(tmp_path), f"--name={name}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert (
        named_sae(tmp_path, "wide-2.b") == tmp_path / "sae-wide-2.b" and named_sae(tmp_path, None) == tmp_path / "sae"
    )
