"""Similarity of ITDA dictionaries: Jaccard by hand, layers matched, what cannot be compared, and the command."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_saes import build, info, rows

from saelab import TrainConfig, train
from saelab.cli.main import main
from saelab.evaluation.similarity import (
    check_same_tokens,
    jaccard,
    jaccard_matrix,
    layer_matching_accuracy,
    model_jaccard,
)
from saelab.io import save_sae
from saelab.saes import ITDASAE, Batch, ITDAConfig


def of(*numbers: int) -> ITDASAE:
    """A dictionary whose atoms are these rows."""
    sae = ITDASAE(ITDAConfig(8), 4)
    sae.labels[: len(numbers), 1] = torch.tensor(numbers)
    sae.n_atoms.fill_(len(numbers))
    return sae


def test_jaccard_by_hand():
    one, other, none = of(1, 2, 3, 4), of(3, 4, 5), of(6)
    assert jaccard(one, other) == jaccard(other, one) == pytest.approx(2 / 5)
    assert jaccard(one, of(4, 3, 2, 1)) == 1 and jaccard(one, none) == 0 and jaccard(of(), of()) == 0
    matrix = jaccard_matrix([one, none], [one, other, none])
    torch.testing.assert_close(matrix, torch.tensor([[1, 0.4, 0], [0, 0, 1]]))
    assert model_jaccard([one, none], [other]) == pytest.approx(2 / 6)


def test_layers_are_matched_in_both_directions():
    first, second = [of(1, 2), of(3, 4), of(5, 6)], [of(1, 2, 9), of(5, 4), of(5, 6)]
    assert layer_matching_accuracy([first, second]) == 1
    assert layer_matching_accuracy([first, [second[0], second[2], second[1]]]) == pytest.approx(2 / 6)
    one_sided = [of(1, 2), of(3, 4), of(1, 2, 3, 4, 9)], [of(1, 2), of(3, 4), of(9)]
    assert layer_matching_accuracy(one_sided) == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="two models or more with as many SAEs each, two or more; these have 3, 2"):
        layer_matching_accuracy([first, second[:2]])
    with pytest.raises(ValueError, match="these have 3\\."):
        layer_matching_accuracy([first])
    with pytest.raises(ValueError, match="two or more; these have 1, 1"):  # right whatever they are
        layer_matching_accuracy([first[:1], second[:1]])


@pytest.mark.parametrize(
    ("compare", "empty"),
    [
        (lambda some: jaccard_matrix([], some), "rows"),
        (lambda some: jaccard_matrix(some, []), "columns"),
        (lambda _: jaccard_matrix([], []), "rows"),
        (lambda some: model_jaccard([], some), "one"),
        (lambda some: model_jaccard(some, []), "other"),
        (lambda _: check_same_tokens([]), "saes"),
    ],
)
def test_nothing_to_compare_is_refused(compare, empty):
    with pytest.raises(ValueError, match=f"^{empty} is empty: give at least one itda SAE"):
        compare([of(1)])


def test_dictionaries_of_other_tokens_are_refused():
    x, (one, longer, other) = rows(60), (ITDASAE(ITDAConfig(8), 12) for _ in range(3))
    one.loss(Batch(x, x), info())
    for part in (x, x[:5]):
        longer.loss(Batch(part, part), info())
    labels = torch.stack([torch.full((60,), 7), torch.arange(60)], 1)
    other.loss(Batch(x, x, labels=labels), info())
    assert jaccard(one, one) == 1
    for wrong in (longer, other):
        with pytest.raises(ValueError, match="were not built from the same tokens in the same order"):
            jaccard(one, wrong)
    with pytest.raises(ValueError, match="is a topk: only the atoms of itda"):
        jaccard(one, build("topk"))


def test_the_command_compares_runs(tmp_path, capsys):
    x, run = rows(400), TrainConfig(n_tokens=128, batch_size=64, device="cpu")
    for name, spread in (("one", 0.0), ("two", 0.05)):
        for layer in (2, 10):
            noise = torch.randn(400, 12, generator=torch.Generator().manual_seed(layer)) * (layer + spread)
            train(ITDAConfig(20, 3), x + noise, run, tmp_path / name / f"sae-{layer}", progress=False)
    train(ITDAConfig(20, 3), x, TrainConfig(192, 64, device="cpu"), tmp_path / "longer" / "sae", progress=False)
    runs = [str(tmp_path / name) for name in ("one", "two")]
    assert main(["similarity", *runs, "--json"]) == 0
    data: Any = json.loads(capsys.readouterr().out)
    assert [one["sae"] for one in data["saes"]] == ["sae-2", "sae-10"] * 2
    assert torch.tensor(data["jaccard"]).diagonal().tolist() == [1] * 4 and data["layer_matching_accuracy"] == 1
    assert main(["similarity", *runs]) == 0
    assert "Layer matching accuracy: 1.000" in capsys.readouterr().out
    assert main(["similarity", runs[0], str(tmp_path / "longer")]) == 2
    assert "were not built from the same tokens" in capsys.readouterr().err
    assert main(["similarity", str(tmp_path / "longer")]) == 2
    assert "holds one itda SAE" in capsys.readouterr().err


def save_of(folder, hook: str, *numbers: int, d_sae: int = 8) -> None:
    """A dictionary of these rows, built at this hook."""
    sae = ITDASAE(ITDAConfig(d_sae), 4)
    sae.labels[: len(numbers), 1] = torch.tensor(numbers)
    sae.n_atoms.fill_(len(numbers))
    sae.provenance = replace(sae.provenance, origin={"hook_name": hook})
    save_sae(sae, folder)


def test_the_command_names_what_jaccard_depends_on(tmp_path, capsys):
    for run, d_sae in (("a", 3), ("b", 8)):
        save_of(tmp_path / run / "sae", "blocks.1.hook_resid_post", 1, 2, 3, d_sae=d_sae)
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["similarity", *runs]) == 0
    said = capsys.readouterr().out
    assert f"depends on where they stopped growing: {tmp_path / 'a' / 'sae'} (d_sae=3)." in said and "3 (full)" in said
    assert "Layer matching accuracy" not in said  # one layer each
    assert main(["similarity", *runs, "--json"]) == 0
    data: Any = json.loads(capsys.readouterr().out)
    assert [one["full"] for one in data["saes"]] == [True, False] and data["layer_matching_accuracy"] is None
    save_of(tmp_path / "b" / "sae-twice", "blocks.1.hook_resid_post", 1, 2)
    assert main(["similarity", runs[1]]) == 0  # told apart
    said = capsys.readouterr().out
    assert (
        "blocks.1.hook_resid_post (sae) " in said
        and "blocks.1.hook_resid_post (sae-twice)" in said
        and "Full" not in said
    )
    assert main(["similarity", *runs]) == 2
    twice = " and ".join(str(tmp_path / "b" / name) for name in ("sae", "sae-twice"))
    assert f"{twice} are of one hook, blocks.1.hook_resid_post" in capsys.readouterr().err
