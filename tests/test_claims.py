"""`saelab bench claims`: experiments, what is kept of a run that is stopped, verdicts, and the page."""

import json
from pathlib import Path

import pytest
import torch

from saelab.benchmarks.absorption import absorption
from saelab.benchmarks.claims import Claim, Side, check
from saelab.benchmarks.planted import hierarchy
from saelab.claims import runs
from saelab.claims.page import claims_page
from saelab.claims.registry import Experiment, experiments, labels
from saelab.claims.runs import run_claims
from saelab.claims.workspace import workspace
from saelab.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
LOWER = Claim("A has less", "small", Side("a", "fvu"), Side("b", "fvu"), paper="Doe 2020: A | B.")
AGAINST = Claim("A has much", "small", Side("a", "l0"), 3.0, below=False, paper="Doe 2020.")
OTHER = Claim("C is there", "other", Side("c", "fvu"), 0.5, paper="Roe 2021.")


class Small:
    """An experiment that counts its runs and may be stopped in one."""

    def __init__(self):
        self.seen, self.stopped_at = [], None

    def measure(self, seed):
        if seed == self.stopped_at:
            raise KeyboardInterrupt
        self.seen.append(seed)
        (workspace() / "harvest").mkdir(parents=True, exist_ok=True)
        return {"a": {"fvu": 0.1 + seed / 10, "l0": 4}, "b": {"fvu": 0.35, "l0": 4}}


@pytest.fixture
def small(monkeypatch):
    small = Small()
    known = {
        "small": Experiment("small", "Two numbers.", small.measure, [LOWER, AGAINST]),
        "other": Experiment("other", "One number.", lambda seed: {"c": {"fvu": 0.1}}, [OTHER]),
    }
    monkeypatch.setattr(runs, "experiments", lambda: known)
    return small


def test_a_stopped_run_goes_on_where_it_was(small, tmp_path):
    small.stopped_at = 2
    with pytest.raises(KeyboardInterrupt):
        run_claims(tmp_path, progress=False)
    assert small.seen == [0, 1]
    small.stopped_at = None
    verdicts = run_claims(tmp_path, progress=False)
    assert small.seen == [0, 1, 2]
    assert (tmp_path / "data" / "harvest").is_dir() and not (workspace() / "harvest").exists()
    assert [verdict.word for verdict in verdicts] == ["held", "held", "held"]
    path = tmp_path / "rows.json"  # killed between the two rows of a seed
    path.write_text(
        json.dumps({**(whole := json.loads(path.read_text())), "rows": whole["rows"][:3] + whole["rows"][4:]})
    )
    again = run_claims(tmp_path, (0, 1, 2, 3), only=["small"], progress=False)
    assert small.seen == [0, 1, 2, 1, 3]
    assert [verdict.word for verdict in again] == ["not held", "held", "held"]  # 0.4 of seed 3 is not below 0.35


def test_what_was_not_asked_for_is_not_run(small, tmp_path, caplog):
    with caplog.at_level("INFO", "saelab"):
        verdicts = run_claims(tmp_path, (1,), only=["other"])
    assert "other, seed 1: One number." in caplog.text
    assert not small.seen
    assert [verdict.word for verdict in verdicts] == ["not run", "not run", "held"]


def test_unknown_experiments_and_no_seeds_are_refused_by_name(small, tmp_path):
    with pytest.raises(ValueError, match=r"only contains 'big', which is no experiment; choose from small, other\."):
        run_claims(tmp_path, only=["other", "big"])
    with pytest.raises(ValueError, match="seeds is empty"):
        run_claims(tmp_path, ())
    with pytest.raises(ValueError, match="seed=-1 must be between 0"):
        run_claims(tmp_path, (0, -1))
    assert not small.seen


def test_the_page_has_every_figure():
    rows = [{"data": "small", "sae": "a", "seed": s, "fvu": 0.1 + s / 10, "l0": 4} for s in (0, 1, 2)]
    rows += [{"data": "small", "sae": "b", "seed": s, "fvu": 0.35, "l0": 4} for s in (0, 1, 2)]
    page = claims_page([check(claim, rows) for claim in (LOWER, AGAINST, OTHER)], [("small", "Two numbers.")])
    assert "2 of 2 claims held; 1 were not run." in page
    assert "made this page, on seeds 0, 1, 2." in page
    figures = "`fvu` of a 0.200 ± 0.100 (0.1, 0.2, 0.3); claimed < b 0.350 ± 0.000 (0.35, 0.35, 0.35)"
    assert f"| Doe 2020: A \\| B. | A has less | `small` | **held** | {figures} |" in page
    assert "| **held** | `l0` of a 4.000 ± 0.000 (4, 4, 4); claimed > 3 |" in page
    assert "| Roe 2021. | C is there | `other` | **not run** |  |" in page
    assert "- **small**: Two numbers." in page


def test_every_claim_names_its_paper_and_compares_what_its_experiment_measures():
    for name, experiment in experiments().items():
        assert experiment.claims and experiment.about.endswith("."), name
        for claim in experiment.claims:
            assert claim.data == name and claim.paper.endswith(".") and claim.text, claim
        assert labels(experiment.claims)


def test_the_command_writes_rows_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("saelab.claims.registry.measure_one", lambda kind, label, seed, steps: {"copies": len(label)})
    assert not main(["bench", "claims", "--only", "signed", "--seeds", "0", "1", "--out-dir", f"{tmp_path}", "--json"])
    answer = json.loads(capsys.readouterr().out)
    told = {one["claim"]: one["verdict"] for one in answer["claims"]}
    assert told["AbsTopK needs fewer features per axis"] == "not held"
    assert told["A parent's feature is off less often than BatchTopK's where a child is on"] == "not run"
    assert "AbsTopK needs fewer features per axis | `signed` | **not held** |" in (tmp_path / "claims.md").read_text()
    assert {row["seed"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]} == {0, 1}


def test_a_parent_that_its_child_replaces_is_absorbed():
    planted = hierarchy(0)
    acts = planted.held_out_feature_acts(4000, 0)
    assert torch.equal(acts @ planted.features, planted.held_out(4000, 0))
    fired = acts != 0
    perfect = absorption(planted.features, planted.features, acts, fired, 8)
    assert perfect == {"absorption": 0, "missed": 0}
    absorbed = fired.clone()
    absorbed[:, 0] &= ~fired[:, 8:12].any(1)  # of the first parent alone
    assert absorption(planted.features, planted.features, acts, absorbed, 8) == {"absorption": 1 / 8, "missed": 0}
    lazy = fired.clone()
    lazy[:, 3] &= fired[:, 8 + 12 : 8 + 16].any(1)
    assert absorption(planted.features, planted.features, acts, lazy, 8) == {"absorption": 0, "missed": 1 / 8}


def test_the_page_of_the_docs_has_a_verdict_for_every_claim():
    lines = PAGE.read_text().splitlines()
    for experiment in experiments().values():
        for claim in experiment.claims:
            (line,) = (one for one in lines if one.startswith("|") and f"| {claim.text} | `{claim.data}` |" in one)
            assert "| **held** |" in line or "| **not held** |" in line, line
            assert claim.paper.replace("|", "\\|") in line
    assert not [line for line in lines if "**not run**" in line]
