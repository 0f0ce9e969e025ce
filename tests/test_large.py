"""The bench of large dictionaries at a tiny size: its data, its rows, what a stop leaves behind, and the command."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from saelab.benchmarks.large import CHUNK, LargeConfig, ZipfRows, run_large
from saelab.cli import main
from saelab.training import sae_run

TINY = LargeConfig(d_in=16, n_features=40, n_active=3, d_sae=64, k=4, n_tokens=64 * 96, batch_size=64, device="cpu")


@pytest.fixture(autouse=True)
def few_held_out_rows(monkeypatch):
    monkeypatch.setattr("saelab.benchmarks.large.HELD_OUT_ROWS", CHUNK)


def test_rows_are_zipf_features_as_many_as_asked():
    data = ZipfRows(TINY, torch.device("cpu"))
    assert float(data.frequency.sum()) == pytest.approx(3) and bool((data.frequency.diff() < 0).all())
    data.features = torch.eye(40)  # a row then shows its codes
    codes = next(data.held_out(CHUNK, 0))
    fired = (codes != 0).double().mean(0)
    assert float(fired.sum()) == pytest.approx(3, rel=0.02)
    assert float((fired - data.frequency).abs().max()) < 5 * (0.25 / CHUNK) ** 0.5
    assert float(codes[codes != 0].mean()) == pytest.approx(1, rel=0.02)
    assert torch.equal(next(data.stream(0)), next(data.stream(0)))
    assert not torch.equal(next(data.stream(0)), codes)


def test_it_says_how_many_tokens_whole_batches_are(tmp_path):
    said: list[str] = []
    run_large(replace(TINY, n_tokens=65), tmp_path, variants=("topk",), progress=False, say=said.append)
    assert said[0] == "Training reads 128 tokens, whole batches, where 65 were asked for."


def test_a_bench_that_was_stopped_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    said: list[str] = []
    whole = run_large(TINY, tmp_path / "whole", every=2048, progress=False, say=said.append)
    marks = [2048 * i for i in range(1, 4)]
    assert [(row["variant"], row["tokens"]) for row in whole] == [
        (name, at) for name in ("topk", "batch_topk") for at in (*marks, "held out")
    ]
    assert len(said) == 8 and said[-1].startswith("batch_topk, held out: dead ")
    for row in whole:
        assert 0 <= row["dead_fraction"] <= 1 and 3 < row["l0"] < 5
    assert whole[3]["fvu"] < whole[0]["fvu"] and 0 <= whole[3]["recovered"] <= whole[3]["recovered_common"] <= 1
    lines = list(csv.DictReader((tmp_path / "whole" / "large.csv").read_text().splitlines()))
    assert [float(line["dead_fraction"]) for line in lines] == [row["dead_fraction"] for row in whole]

    real = sae_run.Run.train_step

    def stop(self, rows):
        if self.sae.variant == "batch_topk" and self.step == 60:
            self.checkpoint()
            raise KeyboardInterrupt
        real(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sae_run.Run, "train_step", stop)
        run_large(TINY, tmp_path / "cut", every=2048, progress=False, say=said.append)
    assert len(json.loads((tmp_path / "cut" / "large.json").read_text())["rows"]) == 4
    assert run_large(TINY, tmp_path / "cut", every=2048, progress=False, say=said.append) == whole


def test_the_command_prints_the_table(tmp_path, capsys):
    sizes = "--d-in 8 --n-features 20 --n-active 2 --d-sae 32 --k 2 --n-tokens 2048 --batch-size 64 --every 1024"
    words = ["bench", "large", "--out-dir", str(tmp_path), "--variants", "topk", "--device", "cpu", *sizes.split()]
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert "topk, held out: dead" in out and "2,048" in out and (tmp_path / "large.csv").exists()


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="n_active=40 must be less than n_features=40"):
        LargeConfig(n_features=40, n_active=40)
