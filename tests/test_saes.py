"""One contract suite over all of `VARIANTS`, then hand-computed numbers for each selection rule and loss."""

from typing import Any

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, config_of, data, info, rows

from saelab.io import load_sae
from saelab.kernels.encode_batch_topk import encode_batch_topk
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.reference.encode_topk import encode_topk as topk_reference
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE, VARIANTS, Batch, ReLUConfig, ReLUSAE, SkipTranscoderSAE, StepInfo, TopKConfig, TopKSAE
from saelab.training import TrainConfig
from saelab.training.data import open_data
from saelab.training.feature_shards import SHARDS
from saelab.training.sae_run import Run

NOT_THE_SLOPE = {
    **dict.fromkeys(("jumprelu", "jumprelu_transcoder"), {"log_threshold"}),
    **dict.fromkeys(("gated", "icfl"), {"W_dec", "b_dec"}),
}
"""Weights whose gradient is not the slope of the loss, on purpose: straight through a step, or held fixed in an aux loss or in a
pursuit."""
NOT_FOLDED = ("codebook", "poly")
"""Variants whose decoder norms are not at 1 at the end: of fixed values, and of products of features."""


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


every = pytest.mark.parametrize("name", VARIANTS)
by_gradient = pytest.mark.parametrize("name", [name for name in VARIANTS if name != "itda"])


@every
def test_names_agree(name):
    assert VARIANTS[name].variant == name
    assert VARIANTS[name].Config.__name__.removesuffix("Config") == VARIANTS[name].__name__.removesuffix("SAE")


def overridden(variant: type[SAE]) -> set[str]:
    """`CLASS.member` for each member of a base class that the variant, or a class between the two, defines again."""
    classes = [one for one in variant.__mro__ if issubclass(one, SAE)]
    found = set()
    for i, base in enumerate(classes[1:], 1):
        again = {name for one in classes[:i] for name in vars(one)} & set(vars(base))
        plain = {name for name in again if not name.startswith("_") and name != "extension_points"}
        found |= {f"{base.__name__}.{name}" for name in plain - base.extension_points}
    return found


@pytest.mark.parametrize("variant", [*VARIANTS.values(), *SHARDS.values()], ids=lambda variant: variant.__name__)
def test_a_variant_overrides_extension_points_alone(variant):
    assert not overridden(variant)


def test_another_override_is_found():
    class Odd(TopKSAE):
        def encode(self, x: Any) -> SparseActs:
            return super().encode(x)

    assert overridden(Odd) == {"SAE.encode"}


def test_every_extension_point_exists_and_is_used():
    variants = [*VARIANTS.values(), *SHARDS.values()]
    bases = {one for variant in variants for one in variant.__mro__ if issubclass(one, SAE)}
    named = set().union(*(base.extension_points for base in bases))
    assert not {name for name in named if sum(name in vars(base) for base in bases) < (1 if name == "variant" else 2)}


@every
@pytest.mark.parametrize("n", [0, 1, 7])
def test_forward_is_decode_of_encode(name, n):
    sae, x = build(name), rows(n)
    if isinstance(sae, SkipTranscoderSAE):
        torch.nn.init.normal_(sae.W_skip, generator=torch.Generator().manual_seed(0))
    output, acts = sae(x), sae.encode(x)
    assert output.x_hat.shape == (n, D_IN) and acts.batch == n and acts.d_sae == D_SAE
    skipped = sae.skip(x) if isinstance(sae, SkipTranscoderSAE) else 0.0
    assert torch.equal(output.x_hat, sae.decode(acts) + skipped)
    assert bool((acts.values != 0).all())


@every
def test_code_does_not_depend_on_the_batch(name):
    sae, x = build(name), rows(31)
    whole = sae.encode(x).to_dense()
    order = torch.randperm(31)
    assert torch.equal(sae.encode(x[order]).to_dense(), whole[order])
    assert torch.equal(sae.encode(x[4:5]).to_dense(), whole[4:5])


@by_gradient
def test_gradient_reaches_every_parameter(name):
    sae, x = build(name), rows(64)
    sae.loss(Batch(x, x), info()).total.backward()
    for parameter_name, parameter in sae.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, parameter_name


@by_gradient
def test_loss_gradient_is_right_in_float64(name):
    sae, x = build(name).double(), rows(6).double()
    held = NOT_THE_SLOPE.get(name, set())
    direction = {n: torch.randn_like(p) * (n not in held) for n, p in sae.named_parameters()}
    sae.loss(Batch(x, x), info()).total.backward()
    slope = sum(float((gradient(p) * direction[n]).sum()) for n, p in sae.named_parameters())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in sae.named_parameters():
                p += sign * 1e-6 * direction[n] * (1 if sign == 1 else 2)
            values.append(sae.loss(Batch(x, x), info()).total.item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@every
def test_bf16_input_is_read_as_fp32(name):
    sae, x = build(name), rows(5).bfloat16()
    assert torch.equal(sae.encode(x).to_dense(), sae.encode(x.float()).to_dense())


@every
@pytest.mark.parametrize("shape", [(4, D_IN + 1), (D_IN,), (2, 3, D_IN)])
def test_a_wrong_width_names_both(name, shape):
    with pytest.raises(ValueError, match=rf"d_in={D_IN}.*\({shape[0]},"):
        build(name).encode(torch.zeros(shape))


@by_gradient
def test_seed_decides_the_weights(name):
    one, same, other = (VARIANTS[name](config_of(name), D_IN, seed=s) for s in (1, 1, 2))
    assert one.hash == same.hash != other.hash


@every
def test_permuting_features_leaves_the_reconstruction(name):
    sae, x = build(name).double(), rows(9).double()
    before, order = sae(x).x_hat, torch.randperm(D_SAE)
    with torch.no_grad():
        for tensor in sae.state_dict().values():  # parameters, and thresholds where each feature has one
            if D_SAE in tensor.shape:
                tensor.copy_(tensor.index_select(tensor.shape.index(D_SAE), order))
    torch.testing.assert_close(sae(x).x_hat, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "rms"), [("center_and_scale", D_IN**0.5), ("scale", D_IN**0.5), ("none", None)])
def test_normalization(kind, rms):
    sae, x = TopKSAE(TopKConfig(D_SAE, 5, normalize=kind), D_IN), rows(4000)
    sae.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
    normal = sae.normalize(x)
    if kind == "none":
        assert torch.equal(normal, x)
        return
    assert float(normal.square().sum(1).mean().sqrt()) == pytest.approx(rms, rel=1e-4)
    if kind == "center_and_scale":
        assert float(normal.mean(0).abs().max()) < 1e-5


def test_topk_fires_k_and_equals_the_reference():
    sae, x = build("topk").double(), rows(50).double()
    got = sae.encode(x)
    want = topk_reference(sae.normalize(x) - sae.b_dec, sae.W_enc, sae.b_enc, 5)
    torch.testing.assert_close(got.to_dense(), want)
    assert got.counts.tolist() == [5] * 50


def test_e3_topk_with_k_of_all_is_the_relu_code():
    """Identity E3: with the same weights and no pre-bias."""
    topk, relu = TopKSAE(TopKConfig(D_SAE, D_SAE), D_IN, seed=1), ReLUSAE(ReLUConfig(D_SAE), D_IN, seed=1)
    x = rows(20)
    assert torch.equal(topk.encode(x).to_dense(), relu.encode(x).to_dense())


@every
def test_e24_folding_decoder_norms_leaves_what_is_rebuilt(name):
    """Codes then are in one unit: the length of what a feature writes."""
    sae, x = (build(name, loss="tanh") if name == "jumprelu" else build(name)).double(), rows(60).double()
    with torch.no_grad():
        if not sae.unit_norm and name not in NOT_FOLDED:
            sae.W_dec *= torch.linspace(0.5, 2, D_SAE, dtype=torch.float64)[:, None]
            sae.W_dec[..., 7, :] = 0  # as of a transcoder's feature that never learned
    before, norms = sae(x), sae.decoder_norms.detach()
    sae.fold_decoder_norms()
    after = sae(x)
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-12, atol=1e-12)
    assert torch.equal(after.acts.features, before.acts.features) and before.acts.nnz > 0
    if name in NOT_FOLDED:
        assert torch.equal(after.acts.values, before.acts.values)
        return
    assert sorted({round(norm, 5) for norm in sae.decoder_norms.tolist()}) in ([1], [0, 1])
    gains = torch.where(norms > 0, norms, 1)[before.acts.features]
    torch.testing.assert_close(after.acts.values, before.acts.values * gains)


@every
def test_training_ends_with_decoder_norms_folded_unless_it_began_before(name, tmp_path):
    changes: dict[str, Any] = {"loss": "tanh"} if name == "jumprelu" else {}
    config = config_of(name, **changes)
    train = TrainConfig(n_tokens=4 * 64, batch_size=64, lr=0.1, device="cpu")
    for rules in (2, 1):
        run = Run(config, open_data(data(name, rows(200)), None), train, tmp_path / str(rules), None, rules=rules)
        for step in range(4):
            run.train_step({"x": rows(64, step), "x.gradient": rows(64, step + 9)})
        x_hat, none = run.sae(rows(50)).x_hat, rows(64)[:0]
        run.finish({"x": rows(64), "x.gradient": rows(64)}, {"x": none, "x.gradient": none}, kept_out=False)
        sae = load_sae(tmp_path / str(rules))
        torch.testing.assert_close(sae(rows(50)).x_hat, x_hat, rtol=1e-3, atol=1e-3)
        norms = sae.decoder_norms.detach()
        is_folded = float((norms[norms > 0] - 1).abs().max()) < 1e-5
        assert is_folded == (sae.unit_norm or (rules == 2 and name not in NOT_FOLDED))


@pytest.mark.parametrize("encode", [encode_topk, encode_batch_topk])
def test_e24_folding_leaves_what_was_ranked_with_the_norms_and_nothing_else(encode):
    x, W_enc, b_enc = torch.randn(30, D_IN), torch.randn(D_SAE, D_IN), torch.randn(D_SAE)
    norms = torch.linspace(0.5, 2, D_SAE)
    n = 4 if encode is encode_topk else 4 * len(x)
    plain = encode(x, W_enc, b_enc, n)
    ranked = encode(x, W_enc, b_enc, n, "decoder_norm", norms)
    folded = encode(x, W_enc * norms[:, None], b_enc * norms, n)
    torch.testing.assert_close(ranked.to_dense() * norms, folded.to_dense())
    assert not torch.equal(plain.to_dense() != 0, folded.to_dense() != 0)


def test_auxk_teaches_dead_features_and_no_live_one():
    sae, x = build("topk"), rows(64)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 8, 30]] = True
    loss = sae.loss(Batch(x, x), info(dead))
    loss.terms["auxk"].backward()
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        reached = gradient(parameter).reshape(D_SAE, -1).abs().sum(1) > 0
        assert torch.equal(reached, dead)
    assert loss.total.item() == pytest.approx((loss.terms["fvu"] + loss.terms["auxk"] / 32).item(), rel=1e-6)


def test_main_loss_leaves_dropped_features_alone():
    sae, x = build("topk"), rows(4)
    loss = sae.loss(Batch(x, x + 1), info())
    loss.terms["fvu"].backward()
    fired = torch.zeros(D_SAE, dtype=torch.bool)
    fired[loss.feature_acts.features] = True
    assert torch.equal(gradient(sae.W_enc).abs().sum(1) > 0, fired)


def test_relu_loss_by_hand():
    """d_in 1, two features: z = (2, 0), decoder norms 3 and 1, x_hat = 6; squared error 16, L1 of 2 * 3."""
    sae = ReLUSAE(ReLUConfig(2, l1_coefficient=0.5, l1_warmup=0.0, normalize="none"), 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [-1.0]]))
        sae.W_dec.copy_(torch.tensor([[3.0], [1.0]]))
    x = torch.tensor([[2.0]])
    loss = sae.loss(Batch(x, x), StepInfo(torch.zeros(2, dtype=torch.bool), 0, 10))
    assert loss.total.item() == 16 + 0.5 * 6
    early = ReLUSAE(ReLUConfig(2, l1_coefficient=0.5, l1_warmup=1.0, normalize="none"), 1)
    early.load_state_dict(sae.state_dict())
    assert early.loss(Batch(x, x), StepInfo(torch.zeros(2, dtype=torch.bool), 4, 10)).total.item() == 16 + 0.25 * 6


def test_relu_penalty_cannot_be_cheated_by_decoder_norms():
    sae, x = build("relu").double(), rows(8).double()
    before = sae.loss(Batch(x, x), info()).total.item()
    with torch.no_grad():
        sae.W_dec.mul_(7)
        sae.W_enc.div_(7)
        sae.b_enc.div_(7)
    assert sae.loss(Batch(x, x), info()).total.item() == pytest.approx(before, rel=1e-10)


def test_after_step_restores_unit_norm():
    sae = build("topk")
    with torch.no_grad():
        sae.W_dec.mul_(5)
    sae.after_step()
    assert (sae.W_dec.norm(dim=1) - 1).abs().max().item() < 1e-6
    relu = build("relu")
    with torch.no_grad():
        relu.W_dec.mul_(5)
    relu.after_step()
    assert relu.W_dec.norm(dim=1).min().item() > 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TopKConfig(16, 17), "k=17.*d_sae=16"),
        (lambda: TopKConfig(16, 0), "k=0"),
        (lambda: TopKConfig(0, 1), "d_sae=0"),
        (lambda: TopKConfig(16, 4, k_aux=0), "k_aux=0"),
        (lambda: TopKConfig(16, 4, auxk_alpha=-1.0), "auxk_alpha=-1"),
        (lambda: TopKConfig(16, 4, normalize="zca"), "zca.*center_and_scale"),
        (lambda: ReLUConfig(16, l1_coefficient=-1.0), "l1_coefficient=-1"),
        (lambda: ReLUConfig(16, l1_warmup=2.0), "l1_warmup=2"),
    ],
)
def test_bad_configs_name_the_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()
