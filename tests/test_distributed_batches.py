"""Data-parallel training on two gloo processes: the same numbers as in one; a killed rank ends it, and it goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_together import together
from ranks_workers import CONFIGS, KILLED, TRAIN, lines, train_each, train_whole_and_cut
from safetensors.torch import load_file
from tiny_runs import make_run

from saelab import load_sae
from saelab.training.checkpoint import list_checkpoints

PAGE = Path(__file__).parents[1] / "docs" / "distributed_training.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Every config of `CONFIGS` in fp64, in one process and in two."""
    folder = tmp_path_factory.mktemp("ranks")
    assert together(1, train_each, folder / "one") == [0]
    assert together(2, train_each, folder / "two") == [0, 0]
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_equal_one_on_the_whole_batch(trained, name):
    one, first, second = (
        load_file(trained / f"{folder}-{rank}.safetensors")
        for folder, rank in ((f"one/{name}", 0), (f"two/{name}", 0), (f"two/{name}", 1))
    )
    assert torch.float64 in {value.dtype for value in one.values()}
    for key, expected in one.items():
        assert torch.equal(first[key], second[key]), f"{key} differs between the ranks"
        torch.testing.assert_close(
            first[key], expected, rtol=1e-12, atol=1e-13, msg=lambda said, key=key: f"{key}: {said}"
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_log_is_that_of_the_whole_batch(trained, name):
    one, two = (lines(trained / folder / name / "here") for folder in ("one", "two"))
    assert [line.keys() for line in one] == [line.keys() for line in two] and len(one) == TRAIN.n_steps
    for expected, line in zip(one, two, strict=True):
        assert line == pytest.approx(expected, rel=1e-12)
    helped = {"topk": "auxk", "batch_topk": "aux_zipf", "feature_choice": "aux_zipf", "matching_pursuit": "auxk"}
    assert name not in helped or any(helped[name] in line for line in one)


def test_only_the_first_rank_writes(trained):
    assert [path.name for path in (trained / "two" / "topk").iterdir()] == ["here"]
    assert json.loads((trained / "two" / "topk" / "here" / "sae.json").read_text())["training"]["ranks"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_shared_is_refused(trained, rank):
    said = (trained / "two" / f"refused-{rank}.txt").read_text()
    assert said == "codebook trains in a single process; this job has 2: start it without torchrun."


def test_a_killed_rank_ends_the_run_and_the_same_call_goes_on_bit_for_bit(tmp_path):
    codes = together(2, train_whole_and_cut, tmp_path, 13)
    assert codes == [0, -signal.SIGKILL]
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("Rank 0 of 2 lost contact with another rank") and said.endswith("from the last checkpoint.")
    assert list_checkpoints(tmp_path / "cut") == [5, 10] and not (tmp_path / "cut" / "sae.json").exists()
    assert together(2, train_whole_and_cut, tmp_path, None) == [0, 0]
    for name in ("sae.safetensors", "golden.safetensors", "sae.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole") and KILLED.n_steps == 20


def test_the_lines_of_the_page_run(tmp_path, tiny_lm):
    """Those of docs/distributed_training.md, with smaller numbers."""
    run = make_run(tmp_path / "run", tiny_lm)
    lines = re.findall(r"^torchrun (.* train runs/mlp .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for name, ranks, line in zip(("plain", "sharded"), (2, "1 x 2"), lines, strict=True):
        small = re.sub(r"--d-sae \d+ --k \d+ --n-tokens [\d_]+", "--d-sae 64 --k 4 --n-tokens 2_560", line)
        words = shlex.split(small.replace("runs/mlp", shlex.quote(str(run))))
        more = ["--batch-size", "256", "--device", "cpu", "--name", name]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words, *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("The topk SAE is in") == 1 and done.stderr.count("| 0/10 ") == 1
        assert json.loads((run / f"sae-{name}" / "sae.json").read_text())["training"]["ranks"] == ranks
        assert load_sae(run / f"sae-{name}").d_sae == 64
