"""An unfinished run goes on by the training rules it began with."""

import json

import pytest
import torch

from saelab.errors import TrainingError
from saelab.saes import TopKConfig
from saelab.saes.step import RULES
from saelab.training import TrainConfig, train

CONFIG = TopKConfig(d_sae=16, k=2)
TRAIN = TrainConfig(n_tokens=64 * 8, batch_size=64, checkpoint_every=2, log_every=1, device="cpu")


def rows():
    return torch.randn(400, 8, generator=torch.Generator().manual_seed(0))


def begin(folder, monkeypatch, rules):
    """A run stopped at step 4, whose run.json says `rules`; nothing where that is None, as the first version wrote it."""
    variant = type(train(CONFIG, rows(), TRAIN, progress=False))
    real = variant.loss

    def stop(self, batch, info):
        if info.step == 4:
            raise KeyboardInterrupt
        return real(self, batch, info)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(variant, "loss", stop)
        train(CONFIG, rows(), TRAIN, folder, progress=False)
    path = folder / "checkpoints" / "run.json"
    noted = json.loads(path.read_text())
    assert noted.pop("rules") == RULES
    path.write_text(json.dumps(noted if rules is None else noted | {"rules": rules}))
    return variant


def rules_seen(variant, monkeypatch, call):
    seen, real = set(), variant.loss
    monkeypatch.setattr(variant, "loss", lambda self, batch, info: seen.add(info.rules) or real(self, batch, info))
    call()
    return seen


@pytest.mark.parametrize(("noted", "followed"), [(None, 1), (1, 1), (RULES, RULES)])
def test_an_unfinished_run_keeps_its_rules(tmp_path, monkeypatch, noted, followed):
    variant = begin(tmp_path / "sae", monkeypatch, noted)
    seen = rules_seen(variant, monkeypatch, lambda: train(CONFIG, rows(), TRAIN, tmp_path / "sae", progress=False))
    assert seen == {followed}
    assert json.loads((tmp_path / "sae" / "sae.json").read_text())["training"]["rules"] == followed
    train(CONFIG, rows(), TRAIN, tmp_path / "sae", progress=False)  # finished: the same call, whatever its rules


@pytest.mark.parametrize("noted", [RULES + 1, 0, "new"])
def test_rules_of_a_later_saelab_are_refused(tmp_path, monkeypatch, noted):
    begin(tmp_path / "sae", monkeypatch, noted)
    with pytest.raises(TrainingError, match="update saelab"):
        train(CONFIG, rows(), TRAIN, tmp_path / "sae", progress=False)


def test_runs_of_different_rules_do_not_share_batches(tmp_path, monkeypatch):
    for config, noted in ((CONFIG, None), (TopKConfig(d_sae=16, k=3), RULES)):
        folder = tmp_path / f"sae-topk-16-k{config.k}"
        monkeypatch.setattr(f"{__name__}.CONFIG", config)
        begin(folder, monkeypatch, noted)
    configs = [TopKConfig(d_sae=16, k=2), TopKConfig(d_sae=16, k=3)]
    with pytest.raises(TrainingError, match="finish each separately"):
        train(configs, rows(), TRAIN, tmp_path, progress=False)
