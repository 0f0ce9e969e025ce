"""The planted-feature bench: rows, claims, pictures, what a stop leaves behind, and the command."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
import torch

from saelab.benchmarks import synthetic
from saelab.benchmarks.claims import Claim, Side, check, check_all
from saelab.benchmarks.diffing import exclusives, own_ratios
from saelab.benchmarks.planted import diffing, superposition
from saelab.benchmarks.planted_claims import CLAIMS
from saelab.benchmarks.results import open_rows, spread, to_csv
from saelab.benchmarks.svg import curves, dot_plot
from saelab.benchmarks.synthetic import KINDS, SAES, at_l0, dictionary, run_synthetic
from saelab.benchmarks.tables import synthetic_picture, synthetic_tables
from saelab.cli import main
from saelab.errors import SaelabError
from saelab.saes import (
    VARIANTS,
    AbsTopKConfig,
    AbsTopKSAE,
    BatchTopKConfig,
    CrosscoderConfig,
    CrosscoderSAE,
    TopKConfig,
)
from saelab.training import TrainConfig, train

CLAIM = Claim("A is better", "mixed", Side("a", "fvu"), Side("b", "fvu"), at_equal_l0=True)


def row(sae, seed, fvu, l0=3.0, data="mixed"):
    return {"data": data, "sae": sae, "seed": seed, "fvu": fvu, "l0": l0}


@pytest.fixture(scope="module")
def signed_rows(tmp_path_factory):
    """The rows of a short run on signed features, and their folder."""
    folder = tmp_path_factory.mktemp("bench") / "synthetic"
    return run_synthetic((0, 1), folder, data=("signed",), n_steps=200, progress=False), folder


def test_a_run_gives_a_row_for_each_sae_and_seed(signed_rows):
    rows, folder = signed_rows
    assert [(r["data"], r["sae"], r["seed"]) for r in rows] == [
        ("signed", name, seed) for name in ("topk", "abs_topk") for seed in (0, 1)
    ]
    for r in rows:
        assert 0.4 < r["mmcs"] < 1 and 0 <= r["recovered"] <= 1 and 0 < r["fvu"] < 0.8
        assert 2.5 < r["l0"] <= 3 and 0 <= r["dead_fraction"] < 1 and r["seconds"] > 0
    assert json.loads((folder / "rows.json").read_text())["rows"] == rows
    lines = list(csv.DictReader((folder / "rows.csv").read_text().splitlines()))
    assert [float(line["fvu"]) for line in lines] == [r["fvu"] for r in rows]


def test_abs_topk_beats_topk_on_signed_features_already_in_a_short_run(signed_rows):
    verdicts = {verdict.claim.text: verdict for verdict in check_all(CLAIMS, signed_rows[0]) if verdict.pairs}
    assert len(verdicts) == 3
    assert verdicts["AbsTopK finds more of the signed axes than TopK"].held


def test_same_seed_same_row_other_seed_another():
    first, again, other = (
        run_synthetic((seed,), data=("signed",), n_steps=10, progress=False)[0] | {"seconds": 0} for seed in (1, 1, 2)
    )
    assert first == again
    assert first["fvu"] != other["fvu"] and first["mmcs"] != other["mmcs"]


def test_finished_rows_are_not_computed_again_and_new_seeds_are(signed_rows, tmp_path, monkeypatch):
    rows, folder = signed_rows
    measured = Mock(return_value={"fvu": 0.5, "l0": 3.0})
    monkeypatch.setattr(synthetic, "measure_one", measured)
    assert run_synthetic((0, 1), folder, data=("signed",), n_steps=200, progress=False) == rows
    assert not measured.called
    (tmp_path / "rows.json").write_text((folder / "rows.json").read_text())
    more = run_synthetic((0, 2), tmp_path, data=("signed",), n_steps=200, progress=False)
    assert [call.args[:3] for call in measured.call_args_list] == [("signed", "topk", 2), ("signed", "abs_topk", 2)]
    assert [r["seed"] for r in more] == [0, 2, 0, 2]


def test_other_settings_and_unknown_data_are_refused(signed_rows, tmp_path):
    with pytest.raises(SaelabError, match="different arguments .n_steps: 200 -> 100"):
        run_synthetic((0,), signed_rows[1], data=("signed",), n_steps=100, progress=False)
    with pytest.raises(ValueError, match="data='zip' must be one of flat, zipf"):
        run_synthetic((0,), data=("zip",))
    with pytest.raises(ValueError, match="seeds is empty"):
        run_synthetic((), data=("flat",))


KILLED = """
import sys
from saelab.benchmarks.results import open_rows
with open_rows(sys.argv[1], {"n": 1}, ("seed",)) as rows:
    for seed in range(1_000_000):
        rows.get(lambda: {"value": seed * seed, "text": "x" * 1000}, seed=seed)
        print(seed, flush=True)
"""


def test_a_kill_leaves_every_finished_row_readable(tmp_path):
    finished = -1
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while finished < 40:
            finished = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        finished = max([finished, *map(int, process.stdout.read().split())])
    with open_rows(tmp_path, {"n": 1}, ("seed",)) as rows:
        assert [r["seed"] for r in rows.rows][: finished + 1] == list(range(finished + 1))
        assert all(r["value"] == r["seed"] ** 2 for r in rows.rows)
        assert rows.get(Mock(side_effect=AssertionError), seed=finished)["value"] == finished**2


def test_two_processes_do_not_share_a_bench(tmp_path):
    with (
        open_rows(tmp_path, {}, ("seed",)),
        pytest.raises(SaelabError, match="Another process"),
        open_rows(tmp_path, {}, ("seed",)),
    ):
        pass


def test_csv_has_all_columns_and_spread_is_mean_and_deviation():
    assert to_csv([{"a": 1}, {"a": 2, "b": None}, {"b": "x,y"}]) == 'a,b\n1,\n2,\n,"x,y"\n'
    assert spread([1.0, 3.0]) == "2.000 ± 1.414"
    assert spread([0.25, None], 2) == "0.25"
    assert spread([None]) == "-"


def test_a_claim_is_held_only_when_every_seed_says_so():
    good = [row("a", 0, 0.1), row("b", 0, 0.2), row("a", 1, 0.3), row("b", 1, 0.4)]
    assert check(CLAIM, good).held
    assert str(check(CLAIM, good)).startswith("held      A is better")
    assert "seed 0: 0.1 < 0.2, seed 1: 0.3 < 0.4" in str(check(CLAIM, good))
    bad = [*good[:3], row("b", 1, 0.3)]
    assert not check(CLAIM, bad).held
    assert str(check(CLAIM, bad)).startswith("not held  A is better")
    assert "seed 1: 0.3 vs 0.3" in str(check(CLAIM, bad))
    assert not check(replace(CLAIM, below=False), good).held
    assert check(replace(CLAIM, below=False), [row("a", 0, 2), row("b", 0, 1)]).held


def test_a_lower_fvu_at_a_higher_l0_does_not_hold():
    rows = [row("a", 0, 0.1, l0=3.2), row("b", 0, 0.2, l0=3.0)]
    assert not check(CLAIM, rows).held
    assert check(replace(CLAIM, at_equal_l0=False), rows).held
    assert check(CLAIM, [row("a", 0, 0.1, l0=2.0), rows[1]]).held


def test_the_right_side_may_be_a_number_or_a_share():
    claim = Claim("Purity", "mixed", Side("a", "fvu"), 0.9, below=False)
    assert check(claim, [row("a", 0, 0.95)]).held and not check(claim, [row("a", 0, 0.85)]).held
    assert "[mixed: fvu of a > 0.9]" in str(check(claim, []))
    share = Claim("Half", "mixed", Side("a", "fvu"), Side("b", "fvu"), times=0.5)
    assert check(share, [row("a", 0, 0.4), row("b", 0, 1.0)]).held
    assert not check(share, [row("a", 0, 0.6), row("b", 0, 1.0)]).held
    assert "fvu of a < 0.5 x fvu of b" in str(check(share, []))


def test_a_claim_without_both_sides_is_not_run_and_one_without_a_number_not_held():
    assert str(check(CLAIM, [row("a", 0, 0.1), row("b", 1, 0.2), row("b", 0, 0.2, data="zipf")])).startswith("not run")
    verdict = check(CLAIM, [row("a", 0, 0.1), {**row("b", 0, 0.0), "fvu": None}])
    assert verdict.pairs and not verdict.held
    assert "0.1 vs none" in str(verdict)


def test_claims_name_runs_that_exist():
    runs = {"fsm": ("codebook",)} | {name: kind.saes for name, kind in KINDS.items()}
    for claim in CLAIMS:
        for side in (claim.left, claim.right):
            assert not isinstance(side, Side) or side.sae in runs[claim.data], claim
    for kind in KINDS.values():
        assert all(" " in label or label == SAES.get(label, (label,))[0] for label in kind.saes)


def test_variants_that_are_not_there_are_left_out(monkeypatch):
    assert at_l0("no_such", 64, 3) is None
    assert at_l0("topk", 64, 3, normalize="scale", n_sources=2) == TopKConfig(64, 3, normalize="scale")
    measured = Mock(return_value={})
    monkeypatch.setattr(synthetic, "measure_one", measured)
    monkeypatch.setattr(synthetic, "VARIANTS", {"topk": VARIANTS["topk"]})
    run_synthetic((0,), progress=False)
    assert {call.args[1] for call in measured.call_args_list} == {"topk", "topk, no aux", "topk, aux_zipf"}


def test_the_finite_state_machine_runs_where_it_is_there(monkeypatch):
    fsm = ModuleType("saelab.benchmarks.fsm")
    result = SimpleNamespace(purity=0.95, purity_hook="h", purities={"h": 0.95}, n_states=50)
    vars(fsm)["run_fsm"] = run_fsm = Mock(return_value=result)
    if "codebook" not in VARIANTS:
        assert run_synthetic((0,), data=("fsm",), progress=False) == []
    monkeypatch.setitem(sys.modules, "saelab.benchmarks.fsm", fsm)
    monkeypatch.setattr(synthetic, "find_spec", Mock())
    monkeypatch.setattr(synthetic, "VARIANTS", {"codebook": Mock()})
    (found,) = run_synthetic((3,), data=("fsm",), n_steps=7, progress=False)
    assert run_fsm.call_args.kwargs == {"seed": 3, "progress": False, "n_steps": 7}
    assert {**found, "seconds": 0} == {
        **{"data": "fsm", "sae": "codebook", "seed": 3, "seconds": 0},
        **{"purity": 0.95, "purity_hook": "h", "n_states": 50},
    }
    (table,) = synthetic_tables([found])
    assert "0.950" in [next(iter(column.cells)) for column in table.columns]


def test_a_penalty_is_asked_for_an_l0_by_target_l0(monkeypatch):
    from dataclasses import make_dataclass

    penalty = make_dataclass("Config", [("d_sae", int), ("target_l0", float, None)])
    both = make_dataclass("Both", [("d_sae", int), ("k", int, 1), ("target_l0", float, None), ("sparsity", str, "")])
    bare = make_dataclass("Bare", [("d_sae", int)])
    fakes = {name: Mock(Config=config) for name, config in (("penalty", penalty), ("both", both), ("bare", bare))}
    monkeypatch.setattr(synthetic, "VARIANTS", fakes)
    assert at_l0("penalty", 8, 3, k_aux=1) == penalty(8, 3)
    assert at_l0("both", 8, 3, sparsity="batch_topk") == both(8, 3, None, "batch_topk")
    assert at_l0("both", 8, 3, sparsity="l1") == both(8, 1, 3, "l1")
    assert at_l0("bare", 8, 3) is None
    assert at_l0("bare", 8, 3, l1_coefficient=0.5) == bare(8)


def test_a_dictionary_is_in_the_units_of_the_data():
    sae = AbsTopKSAE(AbsTopKConfig(8, 2), 4)
    sae.set_normalization(torch.ones(4), 29.0)
    sae.b_dec.data += 1
    assert torch.allclose(dictionary(sae), sae.W_dec / sae.scale, atol=1e-5)


def test_measuring_by_batches_leaves_the_thresholds_alone():
    planted = superposition(0)
    config = TrainConfig(n_tokens=20 * 512, batch_size=512, warmup_steps=5)
    sae = train(BatchTopKConfig(64, 3), planted.stream(0), config, progress=False)
    before = sae.hash
    measured = synthetic.measure(sae, planted, planted.held_out(1024, 0), KINDS["flat"])
    assert sae.hash == before
    assert measured["l0_batch"] == pytest.approx(3, abs=0.01)
    assert measured["fvu_batch"] is not None and measured["fvu_batch"] < 1
    assert "exclusives" not in measured


def test_ratios_are_taken_against_the_model_that_has_the_feature():
    """Swapping the two models of a crosscoder and of its data leaves each feature's ratios."""
    planted = diffing(0, d_in=8, n_shared=6, n_each=2)
    config = TrainConfig(n_tokens=50 * 256, batch_size=256, warmup_steps=5)
    sae = train(CrosscoderConfig(20, 3), planted.stream(0, 256), config, progress=False)
    assert isinstance(sae, CrosscoderSAE)
    x, swapped = planted.held_out(600, 0), copy.deepcopy(sae)
    sources = {"W_enc", "W_dec", "b_dec", "center", "scale"}
    swapped.load_state_dict({name: t.flip(0) if name in sources else t for name, t in sae.state_dict().items()})
    for one, other in zip(own_ratios(sae, x), own_ratios(swapped, x.flip(1)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_exclusives_are_false_where_the_other_source_has_the_feature():
    features = torch.zeros(3, 2, 3)
    features[0, 1, 0] = features[1, 0, 1] = features[1, 1, 1] = features[2, 0, 2] = 1.0
    decoder = features.clone()
    decoder[1, 0] *= 0.01  # a shared feature that the crosscoder calls the second's own
    nu, delta, fair = torch.tensor([0.1, 0.25, 0.3]), torch.tensor([1.0, 0.995, 0.0]), torch.tensor([1.0, 0.5, 0.0])
    expected = {"exclusives": 3.0, "false_exclusives": 1.0, "flagged_false": 1.0, "flagged_true": 0.5}
    assert exclusives(features, decoder, delta, nu, torch.zeros(3)) == expected
    honest = exclusives(features, features, fair, nu, torch.zeros(3))
    assert honest["false_exclusives"] == 0 and honest["flagged_false"] is None
    silent = exclusives(features, decoder, delta, torch.full((3,), torch.nan), torch.full((3,), torch.nan))
    assert silent["exclusives"] == 0
    written_by_others = exclusives(features, decoder, delta, torch.zeros(3), torch.tensor([0.0, 0.6, 0.0]))
    assert written_by_others["flagged_false"] == 1 and written_by_others["flagged_true"] == 0


def test_tables_and_pictures_show_every_sae(signed_rows):
    rows = signed_rows[0]
    (table,) = synthetic_tables(rows)
    assert list(table.columns[0].cells) == ["topk", "abs_topk"]
    assert [str(column.header) for column in table.columns][:3] == ["SAE", "MMCS", "recovered"]
    drawn = ElementTree.fromstring(synthetic_picture(rows))
    circles = [element for element in drawn.iter() if element.tag.endswith("circle")]
    assert len(circles) == 4 * 3
    assert {"topk", "abs_topk", "signed", "FVU"} <= {element.text for element in drawn.iter()}


def test_pictures_place_and_escape():
    drawn = dot_plot({"data": {"<a>": {"m": [0.0, 2.0]}, "b": {}}}, ("m",))
    xs = [float(e.get("cx", "")) for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("circle")]
    assert xs[1] - xs[0] == 250
    lines = ElementTree.fromstring(curves({"<s>": [(16, 0.3), (64, 0.1)], "t": [(32, 0.2)]}, "x", "y"))
    points = [e.get("points", "").split() for e in lines.iter() if e.tag.endswith("polyline")]
    assert [len(row) for row in points] == [2, 1]
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points[0])
    (x3, y3) = map(float, points[1][0].split(","))
    assert x1 < x3 < x2 and y1 < y3 < y2  # more features to the right, a lower FVU further down
    with pytest.raises(ValueError, match="no points"):
        curves({"t": []}, "x", "y")


def test_the_command_prints_tables_and_verdicts_and_says_where(tmp_path, capsys):
    words = [
        "bench",
        "synthetic",
        "--out-dir",
        str(tmp_path / "s"),
        "--data",
        "signed",
        "--seeds",
        "0",
        "--steps",
        "40",
    ]
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert "abs_topk" in said and "MMCS" in said
    assert sum(line.startswith(("held ", "not held ")) for line in said.splitlines()) == 3
    assert sum(line.startswith("not run ") for line in said.splitlines()) == len(CLAIMS) - 3
    assert str(tmp_path / "s") in said.splitlines()[-1]
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"rows.json", "rows.csv", "picture.svg", ".lock"}
    assert main.main([*words[:-1], "50"]) == 2
    assert "different arguments" in capsys.readouterr().err


def test_ctrl_c_keeps_finished_rows(tmp_path):
    words = ["bench", "synthetic", "--data", "flat", "--steps", "150", "--out-dir", str(tmp_path)]
    script = f"from saelab.cli.main import main; raise SystemExit(main({words!r}))"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "rows.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resume from what is on disk" in said
    assert json.loads((tmp_path / "rows.json").read_text())["rows"]
