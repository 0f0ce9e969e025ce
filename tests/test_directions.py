"""Steering vectors written for other programs are what the edits add."""

import gguf
import pytest
import torch
from safetensors import safe_open
from tiny_saes import D_IN, build

from saelab.edits.direction import Direction
from saelab.edits.feature_handle import FeatureHandle
from saelab.errors import SaelabError
from saelab.interop.directions import save_directions, save_gguf
from saelab.steering import Plan

HOOK = "blocks.3.hook_resid_post"


def added(edit) -> torch.Tensor:
    x = torch.randn(1, 2, D_IN)
    return (edit.apply(x, torch.tensor([[1, 2]])) - x)[0, 0]


def edits():
    feature = FeatureHandle(build("topk", "scale"), 5, HOOK, units={"p99": 3.0})
    vector = torch.linspace(-1, 1, D_IN)
    return [feature * 2.0, Direction(vector, HOOK) * 0.5, Direction(vector, "blocks.1.hook_resid_post") * 2.0]


def test_a_control_vector_is_the_sum_of_the_edits_at_each_layer(tmp_path):
    one, other, lower = edits()
    reader = gguf.GGUFReader(save_gguf([one, other, lower], tmp_path / "v.gguf", "llama"))
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert set(found) == {"direction.1", "direction.3"}
    torch.testing.assert_close(found["direction.3"], added(one) + added(other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["direction.1"], added(lower), rtol=1e-4, atol=1e-5)
    for key, value in (("general.architecture", b"controlvector"), ("controlvector.model_hint", b"llama")):
        field = reader.get_field(key)
        assert field is not None and bytes(field.parts[-1]) == value
    count = reader.get_field("controlvector.layer_count")
    assert count is not None and int(count.parts[-1][0]) == 2


def test_plain_directions_name_hook_and_model(tmp_path):
    path = save_directions(edits(), tmp_path / "v.safetensors", "some/model")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "some/model"}
        names = [f"{HOOK}/0", f"{HOOK}/1", "blocks.1.hook_resid_post/2"]
        assert sorted(file.keys()) == sorted(names)
        for name, edit in zip(names, edits(), strict=True):
            torch.testing.assert_close(file.get_tensor(name), added(edit), rtol=1e-4, atol=1e-5)


def test_a_plan_of_constant_vectors_is_written_as_its_edits(tmp_path):
    listed = edits()
    plan = Plan(tuple(listed))
    for save in (save_gguf, save_directions):
        one, other = save(listed, tmp_path / "edits", "llama"), save(plan, tmp_path / "plan", "llama")
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on": "generated"}, "on='generated'"),
        ({"positions": (1, -1)}, r"positions=\(1, -1\)"),
        ({"window": (None, -4)}, "window="),
        ({"gate": Direction(torch.ones(D_IN), HOOK).above(0.5)}, "gate="),
        ({"keep_norm": True, "cap": 2.0}, "cap=2.0, keep_norm=True"),
    ],
)
def test_a_plan_that_depends_on_the_token_is_refused(tmp_path, options, said):
    plan = Plan((Direction(torch.ones(D_IN), HOOK) * 1.0,), **options)
    for save in (save_gguf, save_directions):
        with pytest.raises(SaelabError, match=f"The plan has {said}.* added to every token alike"):
            save(plan, tmp_path / "v", "llama")
    assert not (tmp_path / "v").exists()


def test_what_is_no_constant_vector_is_refused(tmp_path):
    feature = FeatureHandle(build("topk"), 5, HOOK, units={"p99": 3.0})
    by_token = FeatureHandle(build("topk", "layer_norm"), 5, HOOK, units={"p99": 3.0})
    direction = Direction(torch.ones(D_IN), HOOK)
    for edit in (
        feature.ablate(),
        feature.clamp(1.0),
        by_token * 2.0,
        direction.ablate(),
        direction.add(1.0, "resid_norm"),
    ):
        for save in (save_gguf, save_directions):
            with pytest.raises(SaelabError, match="depends on the activations, so it is no constant vector"):
                save([edit], tmp_path / "v", "llama")
    for hook in ("blocks.0.hook_resid_post", "blocks.3.hook_mlp_out"):
        with pytest.raises(SaelabError, match=f"from 1 on .*, not at {hook}"):
            save_gguf([Direction(torch.ones(D_IN), hook) * 1.0], tmp_path / "v", "llama")
    with pytest.raises(SaelabError, match="needs at least one edit"):
        save_gguf([], tmp_path / "v", "llama")
    assert not (tmp_path / "v").exists()
