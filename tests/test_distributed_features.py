"""Features spread over ranks: two and four shards give the numbers of the whole dictionary; checkpoints fit any number."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks_together import together
from ranks_workers import RESUMED, SHARDED, lines, reference, resume_at_four, save_sharded
from safetensors.torch import load_file

from saelab import TrainConfig, saes, train
from saelab.runs import snapshot_folder
from saelab.training.checkpoint import list_checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Cut short by two ranks; then to the end by one, two and four."""
    folder = tmp_path_factory.mktemp("shards")
    assert together(2, save_sharded, folder) == [0, 0]
    for name, ends in RESUMED.items():
        for end in ends:
            shutil.copytree(folder / f"cut-{name}-sharded", folder / f"resumed-{name}-{end}")
    shutil.copytree(folder / "cut-topk-replicated", folder / "resumed-replicated")
    assert together(1, reference, folder) == [0]
    assert together(4, resume_at_four, folder) == [0] * 4  # which also compares selections with ties
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    expected, got = load_file(whole / "sae.safetensors"), load_file(folder / "sae.safetensors")
    assert got.keys() == expected.keys() and expected["W_dec"].dtype == torch.float64
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-14, msg=lambda said, key=key: f"{key}: {said}")
    for then, now in zip(lines(whole), lines(folder), strict=True):
        assert now == pytest.approx(then, rel=1e-12)


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("kind", ["two-{}", "four-{}-2", "four-{}-4"])
def test_shards_equal_the_whole_dictionary(trained, name, kind):
    assert_same_run(trained / kind.format(name), trained / f"whole-{name}")
    assert any("auxk" in line for line in lines(trained / f"whole-{name}"))
    described = json.loads((trained / kind.format(name) / "sae.json").read_text())
    assert (described["d_sae"], described["config"]["d_sae"]) == (SHARDED[name].d_sae,) * 2


@pytest.mark.parametrize("name", SHARDED)
def test_a_snapshot_holds_all_shards(trained, name):
    expected = load_file(snapshot_folder(trained / f"whole-{name}", 4) / "sae.safetensors")
    for kind in ("two-{}", "four-{}-4", "resumed-{}-1"):
        got = load_file(snapshot_folder(trained / kind.format(name), 4) / "sae.safetensors")
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize(("name", "end"), [(name, end) for name, ends in RESUMED.items() for end in ends])
def test_what_two_ranks_saved_goes_on_at_one_and_at_four(trained, name, end):
    cut = trained / f"cut-{name}-sharded"
    assert list_checkpoints(cut) == [3, 6] and (cut / "checkpoints" / "step-00000006").is_dir()
    resumed = trained / f"resumed-{name}-{end}"
    assert_same_run(resumed, trained / f"whole-{name}")
    first = (cut / "metrics.jsonl").read_text().splitlines()[:6]  # with their speed, which no second run has
    assert (resumed / "metrics.jsonl").read_text().splitlines()[:6] == first


def test_a_replicated_checkpoint_goes_on_sharded(trained):
    assert (trained / "cut-topk-replicated" / "checkpoints" / "step-00000006.safetensors").is_file()
    assert_same_run(trained / "resumed-replicated", trained / "whole-topk")


def test_nothing_is_left_under_a_temporary_name(trained):
    assert not [path for path in trained.rglob("*.tmp-*")]


@pytest.mark.parametrize("rank", range(4))
def test_what_cannot_be_sharded_is_refused(trained, rank):
    relu, three, mutual = json.loads((trained / f"refused-{rank}.json").read_text())
    assert relu.startswith("feature_shards=4 works for topk and batch_topk; relu trains data-parallel")
    assert three.startswith("feature_shards=3 needs a multiple of 3 processes; this job has 4")
    assert "mutual_choice trains data-parallel" in mutual


def test_one_process_has_no_shards():
    config = TrainConfig(n_tokens=64, batch_size=64, feature_shards=2)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        train(saes.TopKConfig(64, k=4), torch.randn(64, 8), config, progress=False)


def test_an_altered_shard_is_passed_over(trained):
    folder = trained / "cut-batch_topk-sharded" / "checkpoints"
    path = next((folder / "step-00000006").glob("shard-00002-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    from saelab.training.checkpoint import check_checkpoint, newest_checkpoint

    with pytest.warns(UserWarning, match="step-00000006 is skipped .*was altered"):
        assert newest_checkpoint(folder.parent, lambda path, step: check_checkpoint(path, step, 99)) == 3
