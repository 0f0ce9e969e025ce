"""The family bench on a tiny model: rows, one shared read, what a kill leaves, comparisons at equal L0, the command."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
import torch
from tiny_runs import HOOK, make_run

from saelab.benchmarks import family, measured
from saelab.benchmarks.family import FamilyConfig, run_family
from saelab.benchmarks.tables import comparisons, family_picture, family_tables
from saelab.cli import main
from saelab.errors import SaelabError
from saelab.identity import of_model
from saelab.interop import load_sae
from saelab.models import caching
from saelab.models.caching import Remembered
from saelab.runs import find_saes
from saelab.saes import (
    VARIANTS,
    BatchTopKSAE,
    CodebookConfig,
    CrosscoderConfig,
    ReLUConfig,
    TopKConfig,
    TranscoderConfig,
)
from saelab.training import TrainConfig, train
from saelab.training.metrics_log import read_lines

pytestmark = pytest.mark.usefixtures("models_load_in_fp32")

CONFIG = FamilyConfig(d_sae=48, steps=20, batch_size=200)
OPTIONS = {"variants": ("topk", "batch_topk", "mutual_choice"), "l0": (4, 2), "progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm) -> Path:
    return make_run(tmp_path_factory.mktemp("family") / "run", tiny_lm)


@pytest.fixture(scope="module")
def rows(run, tiny_lm):
    return run_family(run, CONFIG, lm=tiny_lm, seeds=(0, 1), **OPTIONS)


def key(row):
    return row["variant"], row["target_l0"], row["seed"]


def test_a_row_for_each_variant_l0_and_seed(run, rows):
    one_seed = [("topk", 4), ("topk", 2), ("batch_topk", 4), ("batch_topk", 2), ("mutual_choice", 4)]
    assert [key(row) for row in rows] == [(*pair, seed) for seed in (0, 1) for pair in one_seed]
    for row in rows:
        assert 0 < row["fvu"] < 1.5 and 0 <= row["dead_fraction"] <= 1
        assert row["tokens_per_second"] > 0 and row["wall_seconds"] >= row["train_seconds"] > 0
        assert row["l0_as_asked"] == (abs(row["l0"] - row["target_l0"]) <= 0.05 * row["target_l0"])
        sae = load_sae(run / "family" / row["folder"])
        assert (sae.variant, sae.config.k, sae.d_sae) == (row["variant"], row["target_l0"], 48)
        assert sae.provenance.trained["train"]["seed"] == str(row["seed"])
    assert len({row["fvu"] for row in rows if row["variant"] == "topk"}) == 4
    assert len(find_saes(run / "family" / "seed-0")) == 5
    assert all(found.report_path.exists() for found in find_saes(run / "family" / "seed-1"))


def test_each_run_of_a_shared_read_is_timed_by_its_own_steps(monkeypatch, tmp_path):
    """A clock that only the slow SAE moves, by 5 s a step: 40 rows in 5 s; the other's steps take no time."""
    now = [0.0]

    def slowly(*args):
        now[0] += 5.0
        return select(*args)

    slow = family.at_l0("batch_topk", 48, 4)
    select = BatchTopKSAE.select
    monkeypatch.setattr("saelab.training.sae_run.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(BatchTopKSAE, "select", slowly)
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(n_tokens=400, batch_size=40, warmup_steps=1, log_every=5)
    train([family.at_l0("topk", 48, 4), slow], x, config, tmp_path, progress=False)
    rates = {
        folder.name.split("-")[1]: [line["tokens_per_second"] for line in read_lines(folder / "metrics.jsonl")]
        for folder in tmp_path.iterdir()
    }
    assert set(rates["batch_topk"]) == {8.0} and min(rates["topk"]) > 1e6


def test_finished_rows_are_not_computed_again(run, rows, monkeypatch):
    monkeypatch.setattr(family, "train", Mock(side_effect=AssertionError("trained again")))
    monkeypatch.setattr(measured, "evaluate", Mock(side_effect=AssertionError("measured again")))
    assert run_family(run, CONFIG, seeds=(0, 1), **OPTIONS) == rows
    assert run_family(run, CONFIG, variants=("topk",), l0=(4,), progress=False) == rows


def test_other_settings_are_refused_naming_the_difference(run, rows):
    with pytest.raises(SaelabError, match="different arguments .steps: 20 -> 21"):
        run_family(run, FamilyConfig(48, 21, 200), **OPTIONS)


def test_rows_of_another_model_are_refused(run, rows, monkeypatch):
    monkeypatch.setattr(family, "of_model", lambda lm: of_model(lm) | {"model_hash": "f" * 64})
    with pytest.raises(SaelabError, match="different arguments .*model[.]model_hash"):
        run_family(run, CONFIG, seeds=(0, 1), **OPTIONS)


def test_what_cannot_be_compared_is_refused(run):
    with pytest.raises(ValueError, match="variants contains 'topkk', which is unknown; choose from topk, "):
        run_family(run, CONFIG, variants=("topkk",))
    with pytest.raises(ValueError, match="l0 is empty"):
        run_family(run, CONFIG, l0=())
    with pytest.raises(ValueError, match="seeds is empty"):
        run_family(run, CONFIG, seeds=())


def test_other_targets_come_where_the_cache_has_what_they_need():
    asked = ("topk", "relu", "crosscoder", "transcoder", "codebook")
    found = family._configs(asked, FamilyConfig(64, hook_name_out="mlp"), (4, 2), n_hooks=2)
    assert found == {
        ("topk", 4): TopKConfig(64, 4, encoder_decay=1.0),
        ("topk", 2): TopKConfig(64, 2, encoder_decay=1.0),
        ("relu", 4): ReLUConfig(64, target_l0=4),
        ("relu", 2): ReLUConfig(64, target_l0=2),
        ("crosscoder", 4): CrosscoderConfig(64, 4, encoder_decay=1.0),
        ("transcoder", 4): TranscoderConfig(64, 4, hook_name_out="mlp", encoder_decay=1.0),
        ("codebook", 8): CodebookConfig(64),
    }
    alone = family._configs(None, FamilyConfig(64), (4,), n_hooks=1)
    assert {name for name, _ in alone} == set(VARIANTS) - {
        "crosscoder",
        "top_afa",
        "gradient",
        *family.TRANSCODERS,
        *family.LAYERS,
    }
    for name, needs in (("crosscoder", "a cache with at least two hooks"), ("transcoder", "hook_name_out")):
        with pytest.raises(ValueError, match=f"'{name}', which needs {needs}"):
            family._configs([name], FamilyConfig(64), (4,), n_hooks=1)


def test_a_remembered_model_computes_nothing_twice(tiny_lm, monkeypatch):
    ids = [torch.arange(1, 9).reshape(2, 4), torch.arange(9, 17).reshape(2, 4)]
    want = [found[HOOK] for found in tiny_lm.stream_activations(ids, [HOOK])]
    lm = Remembered(tiny_lm)
    passes = Mock(side_effect=lm._capture)
    monkeypatch.setattr(lm, "_capture", passes)
    for _ in range(2):
        got = [found[HOOK] for found in lm.stream_activations(ids, [HOOK])]
        assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))
    assert passes.call_count == 2
    assert lm.hash == tiny_lm.hash and torch.equal(lm.logits(ids[0]), tiny_lm.logits(ids[0]))
    next(iter(lm.stream_activations(ids, ["blocks.0.hook_resid_post"])))
    assert passes.call_count == 3
    zero: Any = SimpleNamespace(hook_name="blocks.0.hook_resid_post", apply=lambda x, positions: torch.zeros_like(x))
    with lm.steer(zero):
        assert not torch.equal(next(iter(lm.stream_activations(ids, [HOOK])))[HOOK], want[0])
    assert torch.equal(next(iter(lm.stream_activations(ids, [HOOK])))[HOOK], want[0])
    for batches in ([[[5, 6, 7], [8]], "a text"], "a text", [[5, 6, 7], [8, 9, 10]]):  # as any model reads them
        for got, wanted in zip(
            lm.stream_activations(batches, HOOK), tiny_lm.stream_activations(batches, HOOK), strict=True
        ):
            assert torch.equal(got[HOOK], wanted[HOOK])
    monkeypatch.setattr(caching, "MOST_BYTES", 0)
    full = Remembered(tiny_lm)
    next(iter(full.stream_activations(ids, [HOOK])))
    assert not full._seen


def test_a_stop_between_rows_loses_no_row(run, rows, tiny_lm, tmp_path, monkeypatch):
    honest, calls = measured.evaluate, []

    def stop_at_the_third(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(measured, "evaluate", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_family(run, CONFIG, lm=tiny_lm, out_dir=tmp_path, **OPTIONS)
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2
    measures = Mock(side_effect=honest)
    monkeypatch.setattr(measured, "evaluate", measures)
    again = run_family(run, CONFIG, lm=tiny_lm, out_dir=tmp_path, **OPTIONS)
    assert measures.call_count == 3
    assert [row["fvu"] for row in again] == [row["fvu"] for row in rows if row["seed"] == 0]


def test_a_kill_in_training_goes_on_to_the_same_weights(run, tiny_folder, tmp_path):
    words = ["bench", "family", str(run), "--d-sae", "48", "--steps", "260", "--batch-size", "200", "--l0", "4"]
    words += ["--variants", "topk", "batch_topk", "--out-dir"]
    script = "import sys; from saelab.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", script, *words, str(tmp_path / "killed")])
    folders = [tmp_path / "killed" / "seed-0" / f"sae-{name}-48-k4" for name in ("topk", "batch_topk")]
    deadline = time.monotonic() + 200
    while not list(folders[1].glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "rows.json").exists()
    assert main.main([*words, str(tmp_path / "killed")]) == 0
    assert main.main([*words, str(tmp_path / "whole")]) == 0
    for folder in folders:
        twin = tmp_path / "whole" / "seed-0" / folder.name
        assert load_sae(folder).hash == load_sae(twin).hash
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")][-1] == 259
    assert len(json.loads((tmp_path / "killed" / "rows.json").read_text())["rows"]) == 2


def line(variant, seed, fvu, level=32, as_asked=True, table="sae"):
    row = {
        "table": table,
        "variant": variant,
        "target_l0": level,
        "seed": seed,
        "fvu": fvu,
        "l0": level * (1 if as_asked else 1.2),
    }
    row |= {"ce_loss_recovered": 0.9, "dead_fraction": 0.0, "tokens_per_second": 100, "wall_seconds": 9.0}
    return row | {"l0_as_asked": as_asked}


def test_one_wins_where_it_does_so_on_every_seed_at_equal_l0():
    won = [line("topk", 0, 0.2), line("batch_topk", 0, 0.1), line("topk", 1, 0.4), line("batch_topk", 1, 0.3)]
    numbers = "FVU 0.2000 ± 0.1414 vs 0.3000 ± 0.1414, held-out L0 32.0 ± 0.0 and 32.0 ± 0.0"
    assert comparisons(won) == [f"batch_topk vs topk at L0 32: {numbers}, seeds 0, 1: wins"]
    assert comparisons([*won[:3], line("batch_topk", 1, 0.5)])[0].endswith(": undecided")
    assert comparisons([line("topk", 0, 0.1), line("batch_topk", 0, 0.2)])[0].endswith(": loses")
    off = [*won[:3], line("batch_topk", 1, 0.3, as_asked=False)]
    assert comparisons(off)[0].endswith("undecided: no topk within 5% of that L0")
    assert comparisons([*off, line("topk", 1, 0.4, 39)])[0].endswith("seeds 0, 1: wins")  # 38.4 is near 39


def test_every_variant_stands_against_the_relu_of_nearest_l0():
    found = [line("relu", 0, 0.3), line("relu", 0, 0.4, 16), line("gated", 0, 0.35), line("topk", 0, 0.2, 16)]
    said = comparisons(found)
    assert [text.partition(":")[0] for text in said] == ["gated vs relu at L0 32", "topk vs relu at L0 16"]
    assert said[0].endswith("loses") and said[1].endswith("wins")
    assert comparisons([line("relu", 0, 0.3), line("topk", 1, 0.3)]) == []
    assert comparisons([line("topk", 0, 0.1), line("abs_topk", 0, 0.2)])[0].endswith(
        ": loses, although its paper claims that it wins: not held"
    )


def test_table_and_picture_hold_every_variant_and_mark_a_missed_l0(rows):
    table, other = family_tables(
        [*rows, line("relu", 0, 0.3, as_asked=False), line("codebook", 0, 0.5, table="codebook")]
    )
    assert list(other.columns[0].cells) == ["codebook"]
    assert list(table.columns[0].cells)[-1] == "relu"
    assert list(table.columns[1].cells)[-1] == "32, missed by over 5 %"
    assert " ± " in next(iter(table.columns[2].cells))
    drawn = ElementTree.fromstring(family_picture([*rows, line("codebook", 0, 0.5, table="codebook")]))
    assert {"topk", "batch_topk", "mutual_choice", "FVU"} <= {element.text for element in drawn.iter()}
    lengths = [len(e.get("points", "").split()) for e in drawn.iter() if e.tag.endswith("polyline")]
    assert lengths == [2, 2, 1]


def test_the_command_prints_table_and_comparisons_and_says_where(run, rows, capsys):
    words = ["bench", "family", str(run), "--d-sae", "48", "--steps", "20", "--batch-size", "200", "--seeds", "0", "1"]
    assert main.main([*words, "--l0", "4", "2", "--variants", *OPTIONS["variants"]]) == 0
    said = capsys.readouterr().out
    assert "mutual_choice" in said and "CE recovered" in said
    assert "batch_topk vs topk at L0 4: FVU" in said and "batch_topk vs topk at L0 2: FVU" in said
    assert str(run / "family") in said.splitlines()[-1]
    assert (run / "family" / "picture.svg").exists()


def test_variants_without_a_curve_are_a_table_alone(run, tmp_path, capsys):
    words = ["--d-sae", "48", "--steps", "2", "--batch-size", "200", "--l0", "4", "--variants", "codebook"]
    assert main.main(["bench", "family", str(run), "--out-dir", str(tmp_path), *words]) == 0
    assert "codebook" in capsys.readouterr().out
    assert (tmp_path / "rows.csv").exists() and not (tmp_path / "picture.svg").exists()


def test_the_command_on_no_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["bench", "family", "no-such"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("saelab: ") and "no-such" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
