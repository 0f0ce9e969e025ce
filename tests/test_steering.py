"""Edits of features and directions: exact no-ops, units, positions, bad input, and the table that compares effects."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.features.collecting.promoted import top_logits
from saelab.models import load_model
from saelab.saes import (
    CrosscoderConfig,
    CrosscoderSAE,
    ReLUConfig,
    ReLUSAE,
    TopKConfig,
    TopKSAE,
    TranscoderConfig,
    TranscoderSAE,
)
from saelab.steering import NEUTRAL_PROMPTS, Direction, FeatureHandle, diff_means, effect_table

HOOK = "blocks.1.hook_resid_post"
PROMPT = "The weather today is fine, and the river runs quietly past the old mill."
N_NEW = 8


def activations(lm, ids: Tensor, hook: str = HOOK) -> Tensor:
    return next(iter(lm.stream_activations([ids], [hook])))[hook]


@pytest.fixture(scope="module", params=["topk", "relu"])
def sae(request, tiny_lm):
    """A random SAE on the tiny model's activations, centred and scaled, with biases that are not zero."""
    x = activations(tiny_lm, tiny_lm.to_ids(PROMPT))[0, 1:].clone()
    topk = request.param == "topk"
    made = TopKSAE(TopKConfig(64, k=8), d_in=32, seed=3) if topk else ReLUSAE(ReLUConfig(64), d_in=32, seed=3)
    made.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
    with torch.no_grad():
        made.b_enc.copy_(torch.linspace(-0.2, 0.2, 64))
        made.b_dec.copy_(torch.linspace(-0.1, 0.3, 32))
    made.provenance = replace(made.provenance, origin={"hook_name": HOOK})
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def feature(sae, tiny_lm) -> FeatureHandle:
    """A feature that fires on some tokens of the prompt, not on all."""
    acts = sae.encode(activations(tiny_lm, tiny_lm.to_ids(PROMPT))[0, 1:].clone()).to_dense()
    share = (acts != 0).float().mean(0)
    chosen = int((share - 0.4).abs().argmin())
    assert 0.1 < share[chosen] < 0.9
    fired = acts[:, chosen][acts[:, chosen] != 0]
    units = {"p99": float(fired.quantile(0.99)), "max": float(fired.max()), "mean": float(fired.mean())}
    return FeatureHandle(sae, chosen, units=units)


class Record:
    """Writes down the feature's own code at every position that the model runs."""

    hook_name = HOOK

    def __init__(self, sae, feature: int):
        self.sae, self.feature, self.values = sae, feature, torch.full((200,), math.nan)

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        self.values[positions[0]] = self.sae.encode(x[0]).column(self.feature)
        return x


def own_values(lm, feature: FeatureHandle) -> Tensor:
    """The feature's own codes on the prompt and on what the model writes after it."""
    record = Record(feature.sae, feature.feature)
    with lm.steer(record):
        generation = lm.generate_ids(PROMPT, N_NEW)
    return record.values[: len(generation.ids) - 1].clone()


def generated(lm, *edits) -> Tensor:
    with lm.steer(*edits):
        return lm.generate_ids(PROMPT, N_NEW, keep_logits=True).logits


# --- exact no-ops


@pytest.mark.parametrize("kind", ["scale", "clamp", "clamp fires", "add zero"])
def test_no_ops_leave_every_bit(tiny_lm, feature, kind):
    values = own_values(tiny_lm, feature)
    assert (values[1:] != 0).any() and (values[1:] == 0).any()
    edit = {
        "scale": feature.scale(1.0),
        "clamp": feature.clamp(values, unit="raw"),
        "clamp fires": feature.clamp(values[None], unit="raw", where="fires"),
        "add zero": feature * 0.0,
    }[kind]
    assert torch.equal(tiny_lm.run_with_edit(PROMPT, edit), tiny_lm.logits(PROMPT))
    assert torch.equal(generated(tiny_lm, edit), generated(tiny_lm))


def test_values_plus_one_change_the_logits(tiny_lm, feature):
    edit = feature.clamp(own_values(tiny_lm, feature) + 1, unit="raw")
    difference = tiny_lm.run_with_edit(PROMPT, edit) - tiny_lm.logits(PROMPT)
    assert torch.equal(difference[0, 0], torch.zeros(300))  # position 0 is left alone
    assert (difference[0, 1:].abs().amax(-1) > 1e-3).all()
    steps = generated(tiny_lm, edit) - generated(tiny_lm)
    assert (steps[0].abs() > 1e-3).any()


def test_ablating_a_silent_feature_keeps_every_bit(tiny_lm, sae):
    silent = FeatureHandle(sae, 0)
    with torch.no_grad():
        before = float(sae.b_enc[0])
        sae.b_enc[0] = -1e6
    try:
        assert torch.equal(tiny_lm.run_with_edit(PROMPT, silent.ablate()), tiny_lm.logits(PROMPT))
    finally:
        sae.b_enc[0] = before


# --- what an edit does to the activations


def test_delta_decode_moves_only_changed_tokens_along_one_row(tiny_lm, feature):
    ids = tiny_lm.to_ids(PROMPT)
    plain = activations(tiny_lm, ids)[0]
    z = feature.sae.encode(plain.clone()).column(feature.feature)
    with tiny_lm.steer(feature.scale(3.0)):
        steered = activations(tiny_lm, ids)[0]
    expected = plain + (2 * z)[:, None] * feature.sae.W_dec[feature.feature] / feature.sae.scale
    fires = (z != 0) & (torch.arange(len(z)) > 0)
    assert torch.allclose(steered[fires], expected[fires], atol=1e-5)
    assert torch.equal(steered[~fires], plain[~fires])
    assert (steered[fires] != plain[fires]).any(-1).all()


def test_add_and_clamp_by_hand(tiny_lm, feature):
    ids = tiny_lm.to_ids(PROMPT)
    plain = activations(tiny_lm, ids)[0]
    row = feature.sae.W_dec[feature.feature] / feature.sae.scale
    z = feature.sae.encode(plain.clone()).column(feature.feature)
    cases = [
        (feature * 2.0, torch.full_like(z, 2 * feature.units["p99"])),
        (2.0 * feature, torch.full_like(z, 2 * feature.units["p99"])),
        (feature.add(-1.0, unit="mean"), torch.full_like(z, -feature.units["mean"])),
        (feature.add(0.5, unit="raw"), torch.full_like(z, 0.5)),
        (feature.clamp(1.0, unit="max"), feature.units["max"] - z),
        (feature.clamp(1.0, where="fires"), torch.where(z != 0, feature.units["p99"] - z, 0.0)),
        (feature.ablate(), -z),
    ]
    for edit, change in cases:
        with tiny_lm.steer(edit):
            steered = activations(tiny_lm, ids)[0]
        change[0] = 0.0
        assert torch.allclose(steered, plain + change[:, None] * row, atol=1e-4), edit


def test_two_features_add_up_in_any_order(tiny_lm, feature):
    other = FeatureHandle(feature.sae, (feature.feature + 1) % 64, units={"p99": 1.0})
    ids = tiny_lm.to_ids(PROMPT)
    plain = activations(tiny_lm, ids)

    def changed(*edits):
        with tiny_lm.steer(*edits):
            return activations(tiny_lm, ids) - plain

    both = changed(feature * 1.0, other * 1.0)
    assert torch.allclose(both, changed(feature * 1.0) + changed(other * 1.0), atol=1e-5)
    assert torch.allclose(both, changed(other * 1.0, feature * 1.0), atol=1e-6)


def test_padding_and_position_zero_are_left_alone(tiny_lm, feature):
    ids, positions = tiny_lm.to_batch(["The", PROMPT])
    x = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(0))
    for edit in (feature * 2.0, Direction(torch.ones(32), HOOK) * 2.0):
        moved = (edit.apply(x, positions) != x).any(-1)
        assert torch.equal(moved, positions > 0)
    assert feature.scale(1.0).apply(x, positions) is x


def test_values_by_sequence_reach_their_own_sequence(feature):
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2], [0, 1, -1]])
    values = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 9.0]])
    edited = feature.clamp(values, unit="raw").apply(x, positions)
    along = ((edited - x) @ feature.sae.W_dec[feature.feature] * feature.sae.scale).flatten()
    z = feature.sae.encode(x.reshape(-1, 32)).column(feature.feature)
    expected = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 0.0]) - z
    expected[[0, 3, 5]] = 0.0
    assert torch.allclose(along, expected, atol=1e-4)


def test_bf16_leaves_unchanged_tokens_alone_and_steers_the_rest(tiny_folder, tiny_lm, feature):
    lm = load_model(tiny_folder, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(lm.run_with_edit(PROMPT, feature.scale(1.0)), lm.logits(PROMPT))
    ids = lm.to_ids(PROMPT)
    plain = activations(lm, ids)
    with lm.steer(feature * 4.0):
        steered = activations(lm, ids)
    assert steered.dtype == torch.bfloat16 and torch.equal(steered[:, 0], plain[:, 0])
    row = feature.sae.W_dec[feature.feature] / feature.sae.scale
    change = (steered - plain)[0, 1:].float().mean(0)
    assert torch.allclose(change, 4 * feature.units["p99"] * row, atol=0.05 * float(plain.abs().max()))


def test_a_steered_text_differs_and_the_model_recovers(tiny_lm, feature):
    plain = tiny_lm.generate(PROMPT, N_NEW)
    with tiny_lm.steer(feature * 20.0):
        steered = tiny_lm.generate(PROMPT, N_NEW)
    assert steered != plain and tiny_lm.generate(PROMPT, N_NEW) == plain


# --- bad input


def test_units_and_strengths_are_checked(feature):
    bare = FeatureHandle(feature.sae, 5)
    with pytest.raises(SaelabError, match="feature 5 has no p99.*unit='raw'"):
        _ = bare * 2.0
    with pytest.raises(SaelabError, match="feature 5 has no max"):
        FeatureHandle(feature.sae, 5, units={"max": 0.0}).clamp(1.0, unit="max")
    assert bare.add(2.0, unit="raw").value == 2.0
    with pytest.raises(ValueError, match="unit='p50'.*p99, max, mean, raw"):
        feature.add(1.0, unit="p50")
    with pytest.raises(ValueError, match="where='sometimes'"):
        feature.clamp(1.0, where="sometimes")
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="strength"):
            feature.scale(wrong)
    with pytest.raises(ValueError, match="not finite"):
        _ = FeatureHandle(feature.sae, 5, units={"p99": 10.0}) * 1e38  # 1e39 is beyond float32
    with pytest.raises(ValueError, match="strength 'much' is not a number"):
        feature.clamp("much")
    with pytest.raises(ValueError, match="finite values \\(seq,\\)"):
        feature.clamp(torch.tensor([1.0, math.nan]), unit="raw")
    with pytest.raises(ValueError, match="finite values \\(seq,\\)"):
        feature.clamp(torch.zeros(1, 2, 3), unit="raw")


def test_features_and_hooks_are_checked(tiny_lm, sae):
    for wrong in (-1, 64):
        with pytest.raises(ValueError, match=f"feature={wrong} .*0 to 63"):
            FeatureHandle(sae, wrong)
    with pytest.raises(ValueError, match="pass hook_name"):
        FeatureHandle(TopKSAE(TopKConfig(d_sae=64, k=8), d_in=32), 3)
    lost = FeatureHandle(sae, 3, hook_name="blocks.7.hook_resid_post").add(1.0, unit="raw")
    with pytest.raises(ValueError, match="blocks.7.hook_resid_post"), tiny_lm.steer(lost):
        pass
    wide = TopKSAE(TopKConfig(d_sae=64, k=8), d_in=48)
    with (
        pytest.raises(ValueError, match="width 48.*width\\s+32"),
        tiny_lm.steer(FeatureHandle(wide, 3, HOOK).add(1.0, unit="raw")),
    ):
        pass


def test_too_few_clamp_values_are_refused(tiny_lm, feature):
    n = tiny_lm.to_ids(PROMPT).shape[1]
    with pytest.raises(ValueError, match=f"positions 0 to {n - 2}, but the model is at position {n - 1}"):
        tiny_lm.run_with_edit(PROMPT, feature.clamp(torch.ones(n - 1), unit="raw"))
    with pytest.raises(ValueError, match=f"is at position {n};"), tiny_lm.steer(feature.clamp(torch.ones(n), "raw")):
        tiny_lm.generate(PROMPT, N_NEW)
    with pytest.raises(ValueError, match="for a batch of 3, but the model runs a batch of 1"):
        tiny_lm.run_with_edit(PROMPT, feature.clamp(torch.ones(3, n), unit="raw"))


# --- directions


def test_direction_by_hand():
    x = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [0.0, 2.0]]])
    positions = torch.arange(3)[None]
    direction = Direction(torch.tensor([2.0, 0.0]), HOOK)
    cases = [
        (direction * 1.5, [[3, 4], [6, 4], [3, 2]]),
        (direction.add(2.0, unit="resid_norm"), [[3, 4], [13, 4], [4, 2]]),
        (direction.ablate(), [[3, 4], [0, 4], [0, 2]]),
    ]
    for edit, expected in cases:
        assert torch.allclose(edit.apply(x, positions), torch.tensor([expected], dtype=torch.float32))
    assert (direction * 0.0).apply(x, positions) is x


def test_bad_directions(tiny_lm):
    for wrong in (torch.zeros(3), torch.ones(2, 2), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="one finite, non-zero vector"):
            Direction(wrong, HOOK)
    direction = Direction(torch.ones(33), HOOK)
    with pytest.raises(ValueError, match="unit='p99'"):
        direction.add(1.0, unit="p99")
    with pytest.raises(ValueError, match="not finite"):
        _ = direction * math.inf
    with pytest.raises(ValueError, match="width 33.*width\\s+32"), tiny_lm.steer(direction * 1.0):
        pass


def test_diff_means_by_hand(tiny_lm):
    pos, neg = [PROMPT, "The red hat <s> was sold"], ["The man said", "house on the hill"]

    def mean(texts):
        kept = []
        for text in texts:
            ids = tiny_lm.to_ids(text)
            rows = activations(tiny_lm, ids)[0]
            kept += [rows[i] for i in range(1, ids.shape[1]) if int(ids[0, i]) not in tiny_lm.special_ids]
        return torch.stack(kept).mean(0)

    assert 0 in tiny_lm.to_ids(pos[1])[0].tolist()  # a special token in the middle
    found = diff_means(tiny_lm, pos, neg, HOOK)
    assert found.hook_name == HOOK and torch.allclose(found.vector, mean(pos) - mean(neg), atol=1e-5)
    with tiny_lm.steer(found * 1.0):
        moved = activations(tiny_lm, tiny_lm.to_ids(PROMPT))[0, 1:]
    plain = activations(tiny_lm, tiny_lm.to_ids(PROMPT))[0, 1:]
    assert torch.allclose(moved, plain + found.vector, atol=1e-5)


def test_diff_means_needs_tokens(tiny_lm):
    with pytest.raises(ValueError, match="neg holds no text"):
        diff_means(tiny_lm, [PROMPT], [], HOOK)
    with pytest.raises(ValueError, match="pos holds 1 texts and no token"):
        diff_means(tiny_lm, ["a"], [PROMPT], HOOK)
    with pytest.raises(ValueError, match="Nearest"):
        diff_means(tiny_lm, [PROMPT], [PROMPT], "blocks.9.hook_resid_post")


# --- the table


class Store:
    """As much of a feature store as the table needs."""

    def __init__(self, sae, densities: list[float]):
        self.sae, self.densities = sae, densities

    def __len__(self) -> int:
        return len(self.densities)

    def table(self, sort, descending, where, limit):
        low, high = where["density"]
        assert sort == "feature" and not descending and limit >= len(self)
        return [{"feature": i} for i, density in enumerate(self.densities) if low <= density <= high]

    def feature(self, i):
        return SimpleNamespace(handle=FeatureHandle(self.sae, i, units={"p99": 30.0}))


def test_effect_table(tiny_lm, capsys):
    """Features whose decoder rows are tokens' own logit directions, at the last hook, beat random directions."""
    hook = "blocks.2.hook_resid_post"
    good = TopKSAE(TopKConfig(d_sae=64, k=8, normalize="none"), d_in=32)
    rows = tiny_lm.logit_weights()[100:164]
    with torch.no_grad():
        good.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    good.provenance = replace(good.provenance, origin={"hook_name": hook})
    densities = [0.001] * 20 + [0.5] * 44
    table = effect_table(tiny_lm, Store(good, densities), n_features=3, n_random=4, seed=1)
    assert len(table.rows) == 3 and all(row.feature < 20 for row in table.rows) and table.failures == []
    assert all(len(row.promoted) == 10 and row.random_mean <= row.random_max for row in table.rows)
    assert all(row.beats_mean and row.rise > 0.5 for row in table.rows)
    printed = capsys.readouterr().out
    assert "Above the mean: 3 of 3" in printed and "Failures (not above the mean): none" in printed
    again = effect_table(tiny_lm, Store(good, densities), n_features=3, n_random=4, seed=1, show=False)
    assert again == table and capsys.readouterr().out == ""
    other = effect_table(tiny_lm, Store(good, densities), n_features=3, n_random=1, seed=2, show=False)
    assert [row.feature for row in other.rows] != [row.feature for row in table.rows]


def test_effect_table_names_failures(tiny_lm, capsys):
    """The same features with the opposite strength push their tokens down."""
    good = TopKSAE(TopKConfig(d_sae=64, k=8, normalize="none"), d_in=32)
    rows = tiny_lm.logit_weights()[100:164]
    with torch.no_grad():
        good.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    handle = FeatureHandle(good, 7, "blocks.2.hook_resid_post", units={"p99": 30.0})
    table = effect_table(tiny_lm, [handle], prompts=NEUTRAL_PROMPTS[:3], n_random=4, strength=-2.0)
    assert table.failures == [7] and table.n_prompts == 3
    assert "Failures (not above the mean): 7." in capsys.readouterr().out


def test_effect_table_bad_input(tiny_lm, sae):
    with pytest.raises(ValueError, match="has 2 features.*n_features=10"):
        effect_table(tiny_lm, Store(sae, [0.001, 0.001, 0.5]))


@pytest.mark.parametrize(
    "site, writes",
    [
        ("hook_resid_pre", True),
        ("hook_resid_mid", True),
        ("hook_resid_post", True),
        ("hook_attn_out", True),
        ("hook_mlp_out", True),
        ("attn.hook_z", False),
    ],
)
def test_hooks_with_logits_are_those_that_effects_are_measured_at(tiny_lm, site, writes):
    """`collect_features` and `effect_table` ask one list; at a hook of the same width that is not in it both say no."""
    hook = f"blocks.1.{site}"
    inside = TopKSAE(TopKConfig(d_sae=8, k=2, normalize="none"), d_in=tiny_lm.d_in(hook))
    assert (top_logits(inside, tiny_lm, hook) is not None) == writes
    handle = FeatureHandle(inside, 3, hook, units={"p99": 1.0})
    if writes:
        (row,) = effect_table(tiny_lm, [handle], ["The weather"], n_random=1, show=False).rows
        assert row.promoted[0] == tiny_lm.tokenizer.decode([int((tiny_lm.logit_weights() @ inside.W_dec[3]).argmax())])
    else:
        with pytest.raises(ValueError, match="does not write to the residual stream"):
            effect_table(tiny_lm, [handle], ["The weather"], n_random=1, show=False)


def test_neutral_prompts():
    assert len(NEUTRAL_PROMPTS) == len(set(NEUTRAL_PROMPTS)) == 20


# --- SAEs of several sites


def test_a_crosscoder_is_steered_at_a_named_source(tiny_lm):
    hooks = ["blocks.0.hook_resid_post", HOOK]
    sae = CrosscoderSAE(CrosscoderConfig(8, 2), 32, n_sources=2)
    sae.set_normalization(torch.zeros(2, 32), torch.tensor([50.0, 2.0]))
    sae.provenance = replace(sae.provenance, origin={"hook_name": HOOK, "hook_names": hooks})
    x, positions = torch.ones(1, 3, 32), torch.tensor([[0, 1, 2]])
    for hook, source in ((None, 1), (hooks[0], 0), (hooks[1], 1)):
        handle = FeatureHandle(sae, 3, hook, units={"p99": 2.0})
        edit = handle * 1.5
        assert edit.hook_name == hooks[source] and edit.d_in == 32
        moved = edit.apply(x, positions) - x
        expected = 3.0 * (sae.W_dec[source, 3] / sae.scale[source]).detach()
        torch.testing.assert_close(moved[0, 1:], expected.expand(2, 32))
        assert not moved[0, 0].any()
        with tiny_lm.steer(edit):
            tiny_lm.logits(PROMPT)
    assert sae.scale[0] != sae.scale[1]
    with pytest.raises(ValueError, match="not a source of this crosscoder, which has blocks.0"):
        FeatureHandle(sae, 3, "blocks.2.hook_resid_post")


def test_a_transcoder_is_steered_where_it_writes():
    sae = TranscoderSAE(TranscoderConfig(8, 2, hook_name_out="blocks.1.hook_mlp_out"), 6, d_out=4)
    sae.set_normalization(torch.zeros(6), 50.0, torch.zeros(4), 2.0)
    with torch.no_grad():
        sae.W_dec[3] = torch.tensor([1.0, 2, 3, 4])
    sae.provenance = replace(sae.provenance, origin={"hook_name": HOOK, "hook_name_out": "blocks.1.hook_mlp_out"})
    edit = FeatureHandle(sae, 3).add(2.0, "raw")
    assert edit.hook_name == "blocks.1.hook_mlp_out" and edit.d_in == 4
    moved = edit.apply(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]))
    torch.testing.assert_close(moved[0, 1], torch.tensor([1.0, 2, 3, 4]) * 2 / 2**0.5)


@pytest.mark.parametrize("kind", ["crosscoder", "transcoder"])
def test_what_needs_the_code_is_refused_where_a_hook_does_not_tell_it(kind):
    sae = CrosscoderSAE(CrosscoderConfig(8, 2), 4, n_sources=2)
    sae.provenance = replace(sae.provenance, origin={"hook_name": HOOK, "hook_names": ["a", HOOK]})
    if kind == "transcoder":
        sae = TranscoderSAE(TranscoderConfig(8, 2, hook_name_out="b"), 4)
        sae.provenance = replace(sae.provenance, origin={"hook_name": HOOK, "hook_name_out": "b"})
    handle = FeatureHandle(sae, 3)
    for edit in (handle.ablate, lambda: handle.scale(2.0), lambda: handle.clamp(1.0, "raw")):
        with pytest.raises(ValueError, match=f"this {kind} cannot compute from .* alone: use add"):
            edit()
    same = TranscoderSAE(TranscoderConfig(8, 2), 4)  # y is x
    assert FeatureHandle(same, 3, HOOK).ablate()
