"""Sweeps on a tiny model: the product of the lists, one read a seed, the bits of an SAE trained alone, going on, the command."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
from tiny_runs import make_run

from saelab.activation_cache.reader import ActivationCache
from saelab.benchmarks import measured, sweep
from saelab.benchmarks.sweep import KEYS, SweepConfig, run_sweep, sweep_points
from saelab.cli import main
from saelab.errors import SaelabError
from saelab.identity import of_model
from saelab.interop import load_sae
from saelab.runs import find_saes
from saelab.saes import VARIANTS, ReLUConfig, TopKConfig
from saelab.training import TrainConfig, train
from saelab.training.sae_run import Run

CONFIG = SweepConfig(n_tokens=2_000, batch_size=200, eval_tokens=200)
LISTS: Any = {"variants": ("topk", "relu"), "d_sae": (48,), "k": (4,), "lr": (None, 1e-3), "seeds": (0, 1)}


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_lm) -> Path:
    return make_run(tmp_path_factory.mktemp("sweep") / "run", tiny_lm)


@pytest.fixture
def run(cached, tmp_path) -> Path:
    """A RUN of its own with that cache and nothing else."""
    shutil.copytree(cached / "cache", tmp_path / "run" / "cache")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def rows(cached, tiny_lm):
    with patch.object(ActivationCache, "batches", autospec=True, side_effect=ActivationCache.batches) as batches:
        found = run_sweep(cached, CONFIG, lm=tiny_lm, progress=False, **LISTS)
    assert [call.kwargs["seed"] for call in batches.call_args_list] == [0, 1]  # one read a seed
    return found


def test_every_combination_once():
    points = sweep_points(CONFIG, variants=("topk", "relu"), d_sae=(48, 64), k=(4, 2, 4), lr=(None, 1e-3), seeds=(0, 1))
    assert len(points) == len({tuple(point.key.values()) for point in points}) == 2 * 2 * 2 * 2 * 2
    assert list(points[0].key) == list(KEYS)
    assert points[0].config == TopKConfig(48, 4) and points[-1].config == ReLUConfig(64, target_l0=2)
    assert points[-1].train == TrainConfig(2_000, 200, lr=1e-3, seed=1)


def test_a_row_and_a_folder_for_each_in_one_sorted_table(cached, rows):
    assert [(row["variant"], row["target_l0"]) for row in rows] == [("relu", 4)] * 4 + [("topk", 4)] * 4
    assert [row["fvu"] for row in rows[4:]] == sorted(row["fvu"] for row in rows[4:])
    folders = {(row["variant"], row["lr"], row["seed"]): row["folder"] for row in rows}
    assert folders["topk", None, 1] == "sae-topk-48-k4-seed1"
    assert folders["relu", 1e-3, 0] == "sae-relu-48-l4-lr0.001-seed0"
    found = find_saes(cached)
    assert {one.name for one in found} == set(folders.values()) and len(found) == 8
    assert all(one.report_path.exists() for one in found)
    assert json.loads((cached / "sweep.json").read_text(encoding="utf-8"))["rows"] == rows
    lines = list(csv.DictReader((cached / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["folder"] for line in lines] == [row["folder"] for row in rows]
    assert {*KEYS, *measured.MEASURES, "tokens_per_second", "wall_seconds"} <= lines[0].keys()


def test_the_bits_are_those_of_the_sae_trained_alone(cached, rows):
    for name, config, lr, seed in (
        ("sae-topk-48-k4-seed1", TopKConfig(48, 4), None, 1),
        ("sae-relu-48-l4-lr0.001-seed0", ReLUConfig(48, target_l0=4), 1e-3, 0),
    ):
        alone = train(config, cached / "cache", TrainConfig(2_000, 200, lr=lr, seed=seed), progress=False)
        assert load_sae(cached / name).hash == alone.hash


def stop_at(call: int, honest):
    """`honest`, but Ctrl-C at that call."""
    calls = []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return honest(*args, **options)

    return stopping


def test_stopped_and_called_again_it_computes_nothing_twice(cached, rows, run, tiny_lm, monkeypatch):
    def call():
        return run_sweep(run, CONFIG, lm=tiny_lm, progress=False, **LISTS)

    measures = Mock(side_effect=measured.evaluate)
    monkeypatch.setattr(measured, "evaluate", measures)
    steps = 4 * 10  # of four SAEs; the first stop is in the second seed's training, the next at its third row
    for owner, name, number in ((Run, "train_step", steps + 17), (measured, "evaluate", 3)):
        with monkeypatch.context() as for_now:
            for_now.setattr(owner, name, stop_at(number, getattr(owner, name)))
            with pytest.raises(KeyboardInterrupt):
                call()
    before = json.loads((run / "sweep.json").read_text(encoding="utf-8"))["rows"]
    assert len(before) == measures.call_count == 6
    with monkeypatch.context() as for_now:
        for_now.setattr(Run, "train_step", Mock(side_effect=AssertionError("trained again")))
        again = call()
    assert measures.call_count == 8 and all(row in again for row in before)
    assert [(row["folder"], row["fvu"]) for row in again] == [(row["folder"], row["fvu"]) for row in rows]
    for row in rows:
        name = f"{row['folder']}/sae.safetensors"
        assert (run / name).read_bytes() == (cached / name).read_bytes()
    monkeypatch.setattr(sweep, "train", Mock(side_effect=AssertionError("trained again")))
    assert call() == again and measures.call_count == 8


def test_longer_lists_add_to_the_table_and_other_settings_are_refused(cached, rows, tiny_lm, monkeypatch):
    lists = LISTS | {"variants": ("topk",), "k": (2, 4), "lr": (None,), "seeds": (0,)}
    trained = Mock(side_effect=train)
    monkeypatch.setattr(sweep, "train", trained)
    more = run_sweep(cached, CONFIG, lm=tiny_lm, progress=False, **lists)
    assert trained.call_args.args[0] == [TopKConfig(48, 2)]
    assert len(more) == 9 and more[4]["target_l0"] == 2 and more[:4] + more[5:] == rows
    with pytest.raises(SaelabError, match="different arguments .n_tokens: 2000 -> 2200"):
        run_sweep(cached, SweepConfig(2_200, 200, 200), lm=tiny_lm, progress=False, **lists)


def test_rows_of_another_model_are_refused(cached, rows, tiny_lm, monkeypatch):
    monkeypatch.setattr(sweep, "of_model", lambda lm: of_model(lm) | {"model_hash": "f" * 64})
    lists = LISTS | {"variants": ("topk",), "k": (2,), "lr": (None,), "seeds": (0,)}
    with pytest.raises(SaelabError, match="different arguments .*model[.]model_hash"):
        run_sweep(cached, CONFIG, lm=tiny_lm, progress=False, **lists)


def test_other_settings_before_the_first_row_are_refused_with_the_flag_of_a_sweep(run, tiny_lm, monkeypatch):
    lists = LISTS | {"variants": ("topk",), "lr": (None,), "seeds": (0,)}
    with monkeypatch.context() as for_now, pytest.raises(KeyboardInterrupt):
        for_now.setattr(Run, "train_step", stop_at(1, Run.train_step))
        run_sweep(run, CONFIG, lm=tiny_lm, progress=False, **lists)
    assert not (run / "sweep.json").exists()
    with pytest.raises(SaelabError, match="n_tokens: 2000 -> 2200.* to resume it, or choose another --out-dir[.]$"):
        run_sweep(run, SweepConfig(2_200, 200, 200), lm=tiny_lm, progress=False, **lists)


def words(run: Path, *more: str) -> list[str]:
    return ["sweep", str(run), "--n-tokens", "2_000", "--batch-size", "200", "--d-sae", "48", "--k", "4", *more]


def test_the_command_prints_one_table_and_says_where(run, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--variants", "topk", "batch_topk", "--lr", "None", "1e-3", "--eval-tokens", "300", "--out-dir", str(out)]
    more += ["--eval-tokens-ce", "0"]
    assert main.main(words(run, *more)) == 0
    said = capsys.readouterr().out
    assert said.count("target L0") == 1 and "4 SAEs" in said and "0.001" in said and "default" in said
    assert f"Next: saelab features {out}; saelab dash {out}" in said
    assert str(out / "sweep.csv") in said and str(out / "sweep.json") in said
    assert len(json.loads((out / "sweep.json").read_text(encoding="utf-8"))["rows"]) == 4
    assert {path.name for path in run.iterdir()} == {"cache"}
    assert (
        main.main(["eval", str(out / "sae-batch_topk-48-k4-lr0.001-seed0"), "--n-tokens", "300", "--n-tokens-ce", "0"])
        == 0
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--k"], "k is empty: list at least one."),
        (["--lr"], "lr is empty: list at least one."),
        (["--lr", "1e-3", "0"], "lr=0.0 must be a positive number, or None for the variant's own."),
        (["--lr", "-1e-3"], "lr=-0.001 must be a positive number"),
        (["--k", "4", "49"], "k=49 "),
        (["--variants", "topk", "relu", "--k", "49"], "=49 "),
        (["--variants", "topkk"], "variants contains 'topkk', which is unknown; choose from topk, "),
        (["--variants", "sparseless"], "variants contains 'sparseless', which has neither k nor target_l0"),
        (["--variants", "transcoder", "--hook-name-out", "nowhere"], "hook_name_out='nowhere' is not in the cache"),
        (["--hook-name", "nowhere"], "hook_name='nowhere' is not in the cache"),
        (["--eval-tokens-ce", "-1"], "eval_tokens_ce=-1 must not be negative."),
        (["--eval-tokens", "0"], "eval_tokens=0 must be at least 1."),
        (["--seeds", "-1"], "seed=-1 must be between"),
        (["--n-tokens", "100"], "n_tokens=100 is less than one batch of 200"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(run, capsys, monkeypatch, more, says):
    @dataclass(frozen=True)
    class Config:
        d_sae: int

    monkeypatch.setitem(VARIANTS, "sparseless", type("Sparseless", (VARIANTS["topk"],), {"Config": Config}))
    assert main.main(words(run, *more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("saelab: ") and says in said and said.count("\n") == 1
    assert {path.name for path in run.iterdir()} == {"cache"}


def test_without_a_cache_it_is_one_line_and_no_folder(tmp_path, capsys):
    assert main.main(words(tmp_path / "none")) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_processes_of_a_job_share_the_saes(run, rows, tiny_lm, monkeypatch):
    """The second of two trains its share and leaves; the first finds those, and its table is that of one process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_sweep(run, CONFIG, lm=tiny_lm, progress=False, **LISTS) == []
    assert len(find_saes(run)) == len(rows) // 2 and not (run / "sweep.json").exists()
    monkeypatch.setenv("RANK", "0")
    shared = run_sweep(run, CONFIG, lm=tiny_lm, progress=False, **LISTS)
    same = [*KEYS, *measured.MEASURES, "folder"]
    assert [[row[name] for name in same] for row in shared] == [[row[name] for name in same] for row in rows]
