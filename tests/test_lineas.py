"""LinEAS: the loss and its closed forms, exact identities, the model left as it was, and the files."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from saelab.errors import SaelabError
from saelab.models import load_model
from saelab.models.differentiable import differentiable_activations
from saelab.steering import AffineEdit, LinEAS, diff_means, lineas
from saelab.steering.text_activations import text_vectors
from saelab.steering.transport import shrink, transport_cost

MID, LATE = "blocks.1.mlp.hook_in", "blocks.2.hook_resid_post"
A, B = ["river", "mill", "house", "hill", "man"], ["word", "light", "end"]
SOURCE = [f"The {a} and the {b} are here!" for a in A for b in B]
TARGET = [f"def {a}({b}): return {b}" for a in A for b in B][:12]
TEXT = "The weather today is fine, and the river runs"


def learned(lm, hooks: str | list[str] = LATE, source=SOURCE, target=TARGET, **options) -> LinEAS:
    return lineas(lm, source, target, hooks, **({"steps": 40, "progress": False} | options))


@pytest.fixture(scope="module")
def maps(tiny_lm) -> LinEAS:
    return learned(tiny_lm, [LATE, MID])


# --- the loss


def test_the_cost_is_the_distance_of_sorted_values():
    u, v = (torch.randn(12, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    wanted = (u.sort(0).values - v.sort(0).values).square().mean(0)
    torch.testing.assert_close(transport_cost(u, v), wanted)
    shuffled = torch.randperm(12)
    assert torch.equal(transport_cost(u[shuffled], v), transport_cost(u, v[shuffled]))
    assert float(transport_cost(u, u[shuffled]).max()) == 0
    for n, m in ((4, 6), (12, 5), (1, 3)):  # sets of different sizes: as if each value came m or n times
        wide = transport_cost(u[:n].repeat_interleave(m, 0), v[:m].repeat_interleave(n, 0))
        torch.testing.assert_close(transport_cost(u[:n], v[:m]), wide)


def test_one_set_has_no_loss_and_no_gradient():
    u = torch.randn(9, 4).double()
    weight, bias = torch.ones(4).double().requires_grad_(), torch.zeros(4).double().requires_grad_()
    loss = transport_cost(weight * u + bias, u[torch.randperm(9)]).sum()
    assert float(loss.detach()) == 0
    assert all(not bool(one.any()) for one in torch.autograd.grad(loss, (weight, bias)))


def test_one_set_learns_nothing(tiny_lm):
    same = learned(tiny_lm, [MID, LATE], SOURCE, SOURCE[::-1], steps=10)
    assert same.loss_start < 1e-6 and same.loss_end < 1e-6
    assert all(float(one.weight.abs().max()) < 1e-4 and float(one.bias.abs().max()) < 1e-4 for one in same.maps)


@pytest.mark.parametrize("target", [TARGET, TARGET + SOURCE[:3]])
def test_one_hook_has_the_closed_form(tiny_lm, target):
    """w = sum(sorted xc yc) / sum(xc^2), b = mean(y) - w mean(x), with as many texts on both sides."""
    x = text_vectors(tiny_lm, SOURCE[: len(target)], LATE, "source").sort(0).values
    y = text_vectors(tiny_lm, target, LATE, "target").sort(0).values
    xc, yc = x - x.mean(0), y - y.mean(0)
    w = (xc * yc).sum(0) / xc.square().sum(0)
    found = learned(tiny_lm, LATE, SOURCE[: len(target)], target, steps=60, batch_size=99).maps[0]
    torch.testing.assert_close(1 + found.weight.double(), w, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.bias.double(), y.mean(0) - w * x.mean(0), rtol=5e-3, atol=5e-3)


def test_the_penalty_shrinks_numbers_and_groups():
    weight, bias = torch.tensor([3.0, -4.0, 0.5, -0.2]), torch.tensor([0.1, 0.0, 0.0, -0.1])
    found = shrink(weight, bias, 0.5, 0.0)
    assert found[0].tolist() == [2.5, -3.5, 0, 0] and not bool(found[1].any())
    one, other = shrink(weight, bias, 0.0, 0.5)
    torch.testing.assert_close(one, weight * (1 - 1 / weight.norm()))
    assert not bool(other.any())


# --- the maps


def test_strength_zero_leaves_every_bit(tiny_lm, maps):
    plain = tiny_lm.logits(TEXT)
    for edits in (maps * 0.0, maps.edits(0)):
        assert torch.equal(tiny_lm.run_with_edit(TEXT, edits), plain)
    assert not torch.equal(tiny_lm.run_with_edit(TEXT, maps.edits()), plain)


def test_the_loss_falls_and_is_that_of_the_edits(tiny_lm, maps):
    assert [one.hook_name for one in maps.maps] == [MID, LATE] and len(maps.losses) == 40
    assert maps.loss_end < 0.5 * maps.loss_start
    assert maps.losses[0] == pytest.approx(maps.loss_start, rel=1e-4)

    def mean_distance(*edits):
        with tiny_lm.steer(*edits):
            x = text_vectors(tiny_lm, SOURCE, LATE, "source")
        return float((x.mean(0) - text_vectors(tiny_lm, TARGET, LATE, "target").mean(0)).norm())

    distances = [mean_distance(*maps * strength) for strength in (0.0, 0.5, 1.0)]
    assert distances[2] < distances[1] < distances[0] and distances[2] < 0.3 * distances[0]
    assert "LinEAS(maps at 2 hooks" in repr(maps) and "strength 0.5" in repr(maps.edits(0.5)[0])


def test_an_edit_is_the_map_off_position_0(tiny_lm, maps):
    x, positions = torch.randn(1, 4, 32), torch.tensor([[0, 1, 2, -1]])
    edit = maps.edits(0.5)[1]
    wanted = x + 0.5 * (edit.weight * x + edit.bias)
    torch.testing.assert_close(edit.apply(x, positions)[0, 1:3], wanted[0, 1:3])
    assert torch.equal(edit.apply(x, positions)[0, [0, 3]], x[0, [0, 3]])
    assert edit.apply(x.half(), positions).dtype == torch.half
    with pytest.raises(ValueError, match="width"), tiny_lm.steer(AffineEdit(LATE, torch.ones(8), torch.ones(8))):
        pass


def test_sparsity_grows_with_gamma_to_the_identity(tiny_lm):
    found = [learned(tiny_lm, gamma=gamma, group=0.1, steps=15) for gamma in (0.0, 0.3, 1.0, 3.0, 1e6)]
    sparsity = [one.sparsity for one in found]
    assert sparsity == sorted(sparsity) and sparsity[0] == 0 and sparsity[-1] == 1 and len(set(sparsity)) > 3
    x = torch.randn(1, 3, 32)
    assert found[-1].edits()[0].apply(x, torch.tensor([[0, 1, 2]])) is x
    assert torch.equal(tiny_lm.run_with_edit(TEXT, found[-1].edits()), tiny_lm.logits(TEXT))
    for sparse, loss in pairwise([(one.sparsity, one.loss_end) for one in found]):
        assert sparse[1] <= loss[1] * 1.001


def test_texts_beyond_a_batch_are_drawn_with_the_seed(tiny_lm):
    one, again, other = (learned(tiny_lm, batch_size=6, seed=seed, steps=8) for seed in (0, 0, 1))
    assert one.losses == again.losses and torch.equal(one.maps[0].weight, again.maps[0].weight)
    assert one.losses != other.losses


def test_too_large_steps_are_taken_again(tiny_lm):
    found = learned(tiny_lm, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", LATE], lr=0.5, steps=40)
    assert found.loss_end < 0.2 * found.loss_start


# --- the model


def state(lm):
    weights = list(lm.model.parameters())
    modules = [(one.training, len(one._forward_hooks), len(one._forward_pre_hooks)) for one in lm.model.modules()]
    return [one.detach().clone() for one in weights], [(one.requires_grad, one.grad) for one in weights], modules


def test_the_model_is_left_as_it_was(tiny_folder, monkeypatch):
    lm = load_model(tiny_folder, dtype=torch.float32, device="cpu")
    lm.model.train()
    next(lm.model.parameters()).requires_grad_(True)
    before, plain = state(lm), lm.logits(TEXT)

    def unchanged():
        now = state(lm)
        assert all(torch.equal(a, b) for a, b in zip(before[0], now[0], strict=True)) and now[1:] == before[1:]
        assert torch.equal(lm.logits(TEXT), plain) and not lm.edits

    with torch.inference_mode():
        learned(lm, steps=2)
    unchanged()
    for cause in (KeyboardInterrupt, RuntimeError):

        def stopped(self, *args, cause=cause):
            raise cause

        with monkeypatch.context() as patch:
            patch.setattr(AffineEdit, "apply", stopped)
            with pytest.raises(cause):
                learned(lm, [MID, LATE], steps=2)
        unchanged()


def test_gradients_are_those_of_finite_differences(tiny_lm):
    batch = tiny_lm.to_batch(SOURCE[:2])

    def loss(bias):
        edit = AffineEdit(MID, torch.zeros(32), bias)
        found = differentiable_activations(tiny_lm, batch, [MID, LATE], [edit])
        return found[LATE][:, 1:].double().square().mean() + found[MID][:, 1:].double().mean()

    bias = torch.zeros(32).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(bias), bias)
    for i in (0, 7, 31):
        step = 0.02 * torch.eye(32)[i]
        with torch.no_grad():
            slope = float(loss(step) - loss(-step)) / 0.04
        assert slope == pytest.approx(float(gradient[i]), rel=1e-2, abs=1e-4)


# --- files and bad input


def test_files_keep_every_bit(maps, tmp_path):
    read = LinEAS.load(maps.save(tmp_path / "maps"))
    for one, other in zip(maps.maps, read.maps, strict=True):
        assert one.hook_name == other.hook_name
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
    assert read.losses == maps.losses and read.settings == maps.settings
    assert (read.loss_start, read.loss_end, read.model) == (maps.loss_start, maps.loss_end, maps.model)
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["lineas.json", "lineas.safetensors"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hash": "0"}, "was altered"),
        ({"format_version": 99}, "update saelab"),
        ({"hook_names": ["blocks.0.hook_resid_post"]}, "no complete LinEAS maps"),
        ({"losses": None}, "no complete LinEAS maps"),
        (None, "no complete LinEAS maps"),
    ],
)
def test_altered_files_are_refused(maps, tmp_path, change, said):
    folder = maps.save(tmp_path / "maps")
    if change is None:
        (folder / "lineas.safetensors").write_bytes(b"no tensors")
    else:
        meta = json.loads((folder / "lineas.json").read_text())
        (folder / "lineas.json").write_text(json.dumps(meta | change))
    with pytest.raises(SaelabError, match=said):
        LinEAS.load(folder)
    with pytest.raises(SaelabError, match="does not exist"):
        LinEAS.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": SOURCE[:1]}, "source holds one text"),
        ({"target": []}, "target holds no text"),
        ({"target": ["fine words", "x"]}, r"target\[1\] has no token"),
        ({"hooks": "blocks.9.hook_resid_post"}, "does not exist in the editable hooks"),
        ({"hooks": []}, "hook_names is empty"),
        ({"steps": -1}, "steps=-1"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"lr": -0.1}, "lr=-0.1 must be at least 0"),
        ({"gamma": float("nan")}, "gamma nan is not finite"),
        ({"lr": float("inf")}, "lr inf is not finite"),
        ({"lr": True}, "lr True is not a number"),
        ({"group": -1.0}, "group=-1 must be at least 0"),
        ({"steps": True}, "steps=True must be a whole number"),
    ],
)
def test_what_is_refused(tiny_lm, change, said):
    with pytest.raises(ValueError, match=said):
        learned(tiny_lm, **change)


@pytest.mark.parametrize("steps", [1, 3])
def test_maps_that_are_not_finite_are_an_error(tiny_lm, steps):
    with pytest.raises(SaelabError, match=r"learned with lr=1e\+30 are not finite.*smaller lr"):
        learned(tiny_lm, lr=1e30, steps=steps)
    assert tiny_lm.edits == ()


def test_a_steered_model_and_a_bad_strength_are_refused(tiny_lm, maps):
    with (
        tiny_lm.steer(diff_means(tiny_lm, SOURCE, TARGET, LATE) * 1.0),
        pytest.raises(ValueError, match="being steered"),
    ):
        learned(tiny_lm)
    with pytest.raises(ValueError, match="not finite"):
        _ = maps * float("inf")
    nothing = learned(tiny_lm, steps=0)
    assert nothing.losses == () and nothing.loss_start == nothing.loss_end and nothing.sparsity == 1
