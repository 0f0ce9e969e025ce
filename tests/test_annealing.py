"""A k that falls from `k_start` to `k`: by hand, in what a training step keeps, in a resumed run, and refused where it cannot."""

from typing import Any

import pytest
import torch
from tiny_saes import D_SAE, build, config_of, rows

from saelab import TrainConfig, harvest, load_sae, presets, train
from saelab.cli.main import main
from saelab.files import read_json
from saelab.saes import BatchTopKConfig, StepInfo, TopKConfig
from saelab.saes.annealing import annealed_k
from saelab.training.feature_shards import check_shardable

BATCHWISE = ("batch_topk", "mutual_choice", "matryoshka")


def at(step: int) -> StepInfo:
    return StepInfo(torch.zeros(D_SAE, dtype=torch.bool), step, 100)


def test_k_by_hand():
    config = TopKConfig(40, 5, k_start=25)
    assert [annealed_k(config, at(step)) for step in (0, 10, 25, 49, 50, 99)] == pytest.approx([25, 21, 15, 5.4, 5, 5])
    assert annealed_k(TopKConfig(40, 5), at(0)) == 5
    assert annealed_k(config, StepInfo(torch.zeros(40, dtype=torch.bool), 0, 1)) == 25


@pytest.mark.parametrize(("step", "kept"), [(0, 20), (24, 13), (26, 12), (60, 5)])
def test_topk_keeps_the_nearest_whole_number_and_at_inference_k(step, kept):
    sae = build("topk", k_start=20)
    with torch.no_grad():
        sae.b_enc.fill_(30.0)  # everything is positive
    x = sae.normalize(rows(9))
    assert sae.select(x, at(step)).counts.tolist() == [kept] * 9
    assert sae.encode(rows(9)).counts.tolist() == [5] * 9
    torch.testing.assert_close(
        sae.select(x, at(step)).to_dense(), build_like(sae, kept).encode_normalized(x).to_dense()
    )


def build_like(sae, k: int):
    other = build("topk", k=k)
    other.load_state_dict(sae.state_dict())
    return other


@pytest.mark.parametrize("name", BATCHWISE)
def test_batchwise_variants_keep_fractions_of_k(name):
    sae = build(name, k_start=20)
    with torch.no_grad():
        sae.b_enc.fill_(30.0)
    x = sae.normalize(rows(10))
    assert [sae.select(x, at(step)).nnz for step in (0, 1, 27, 60)] == [200, 197, 119, 50]


def test_multi_topk_widens_the_k_of_the_step():
    from saelab.saes import Batch

    sae, plain = build("topk", k_start=8, multi_topk=True), build("topk", k=32)
    plain.load_state_dict(sae.state_dict())
    wide = plain.loss(Batch(rows(20), rows(20)), at(0)).terms["fvu"]
    torch.testing.assert_close(sae.loss(Batch(rows(20), rows(20)), at(0)).terms["multi_topk"], wide)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    config = config_of(name, D_SAE, k_start=20)
    steps = TrainConfig(n_tokens=128 * 30, batch_size=128, warmup_steps=5, checkpoint_every=10, log_every=5)
    x = rows(1000)
    sae = train(config, x, steps, tmp_path / "sae", progress=False)
    for file in ("sae.json", "sae.safetensors", "golden.safetensors"):
        (tmp_path / "sae" / file).unlink()
    assert train(config, x, steps, tmp_path / "sae", progress=False).hash == sae.hash
    assert train(config_of(name, D_SAE), x, steps, progress=False).hash != sae.hash


def test_memory_is_planned_for_the_largest_k():
    config = TopKConfig(40, 5, k_start=25)
    assert build("topk").peak_l0(config) == 25 and build("topk").expected_l0(config) == 5
    assert build("batch_topk").peak_l0(BatchTopKConfig(40, 5, k_start=25)) == 25
    with pytest.raises(ValueError, match="each shard with at least k=25 features"):
        check_shardable(type(build("topk")), config, 2)


@pytest.mark.parametrize("Config", [TopKConfig, BatchTopKConfig])
@pytest.mark.parametrize("start", [4, 41, 0])
def test_k_start_out_of_range_is_refused(Config, start):
    with pytest.raises(ValueError, match=f"k_start={start}"):
        Config(40, 5, k_start=start)
    with pytest.raises(ValueError, match="groupmax.*k_start"):
        TopKConfig(40, 5, k_start=10, select="groupmax")


def test_the_k_sparse_preset():
    assert presets.k_sparse(64, 15) == TopKConfig(64, 15, k_start=64, auxk_alpha=0.0, pre_bias=False)
    assert presets.k_sparse(1000, 15).k_start == 100
    assert presets.k_sparse(1000, 15, 50, normalize="none") == TopKConfig(
        1000, 15, k_start=50, auxk_alpha=0.0, pre_bias=False, normalize="none"
    )


def test_presets_on_the_command_line_give_way_to_flags(tmp_path, tiny_lm):
    texts = [f"{i} " + "the river runs past an old mill " * 9 for i in range(60)]
    harvest(tiny_lm, texts, ["blocks.0.hook_resid_post"], 2000, tmp_path / "cache", ctx_len=64)

    def trained(name: str, *words: str) -> tuple[Any, dict[str, Any]]:
        size = ["--d-sae", "48", "--n-tokens", "2560", "--checkpoint-every", "0"]
        assert main(["train", str(tmp_path), "--name", name, *size, *words]) == 0
        folder = tmp_path / f"sae-{name}"
        return load_sae(folder).config, read_json(folder / "checkpoints" / "run.json")["train"]

    config, _ = trained("k", "--preset", "k_sparse", "--k", "4", "--batch-size", "128", "--auxk_alpha=0.5")
    assert config == TopKConfig(48, 4, k_start=27, auxk_alpha=0.5, pre_bias=False)
    config, run = trained("fast", "--variant", "relu", "--preset=fast", "--lr", "1e-3")
    assert config == presets.fast("relu", 6)[0] and config.l1_warmup == 1 / 32
    assert [run[name] for name in ("batch_size", "lr", "seed", "decay_fraction")] == ["128", "0.001", "42", "0.95"]


def test_a_preset_of_another_variant_is_refused(tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    assert main(["train", str(tmp_path), "--preset", "fast"]) == 2
    assert "variant='topk' must be one of relu, jumprelu: those of the preset fast" in capsys.readouterr().err
