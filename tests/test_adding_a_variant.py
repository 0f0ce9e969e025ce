"""The page that shows how a variant is added is true: its code, taken from the page, trains, saves, loads and resumes."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from saelab import TrainConfig, load_sae, train
from saelab.cli.main import main
from saelab.saes import VARIANTS

DOCS = Path(__file__).parents[1] / "docs/variants"


@pytest.fixture
def norm_topk(tmp_path, monkeypatch):
    """The variant of the page, in `VARIANTS` while the test runs."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "adding.md").read_text(), re.DOTALL)
    assert code.count("\n") < 60
    (tmp_path / "norm_topk.py").write_text(code)
    spec = importlib.util.spec_from_file_location("norm_topk", tmp_path / "norm_topk.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "norm_topk", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(VARIANTS, "norm_topk", module.NormTopKSAE)
    return module


def test_the_page_is_short_enough():
    assert len((DOCS / "adding.md").read_text().splitlines()) < 60


def test_the_added_variant_trains_saves_and_loads(norm_topk, tmp_path):
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    config = norm_topk.NormTopKConfig(32, 4)
    sae = train(config, x, TrainConfig(n_tokens=6400, batch_size=64), tmp_path / "sae", progress=False)
    back = load_sae(tmp_path / "sae")
    assert type(back) is norm_topk.NormTopKSAE and back.hash == sae.hash
    assert torch.equal(back.encode(x).to_dense(), sae.encode(x).to_dense())
    norms = sae.W_dec.norm(dim=1)
    score = ((sae.normalize(x) - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * norms
    assert torch.equal(sae.encode(x).to_dense() != 0, (score >= score.topk(4, 1).values[:, 3:]) & (score > 0))


def test_the_command_line_knows_it(norm_topk, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path), "--variant", "norm_topk", "--help"])
    assert stopped.value.code == 0 and "--auxk-alpha" in capsys.readouterr().out


def test_every_variant_has_a_page_and_a_line():
    table = (DOCS / "README.md").read_text()
    for name in VARIANTS:
        assert f"[`{name}`]({name}.md)" in table
        assert 10 <= len((DOCS / f"{name}.md").read_text().splitlines()) <= 50, name
