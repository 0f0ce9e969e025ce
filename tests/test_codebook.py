"""Codebook features: selection, gradients, upkeep by hand; codebooks inside a model: insert, finetune, force, save."""

import copy
import json
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import normalize

import saelab
from saelab.errors import ModelError, SaelabError
from saelab.models import load_model
from saelab.models.hooks import attach
from saelab.saes import Batch, CodebookConfig, CodebookSAE, StepInfo
from saelab.saes.codebook import find_codes, finetune, insert, load, save
from saelab.saes.codebook.gradients import codebook_loss, rotation_trick, straight_through
from saelab.saes.codebook.nearest import most_similar
from saelab.saes.codebook.quantizer import Codebook
from saelab.saes.codebook.revival import closest_inputs, draw_inputs, generator_of, kmeans, towards_anchors, usage_after

MLP, HEADS, RESID = "blocks.1.hook_mlp_out", "blocks.0.attn.hook_z", "blocks.1.hook_resid_post"


def rows(n: int, d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def book(d_in: int = 12, groups: int = 1, with_norm: bool = False, **changes) -> Codebook:
    arguments: dict[str, Any] = {"d_sae": 24, "k": 3} | changes
    config = CodebookConfig(**arguments)
    return Codebook(config, d_in, groups, with_norm, seed=1).eval()


def info() -> StepInfo:
    return StepInfo(torch.zeros(24, dtype=torch.bool), 0, 100)


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


# --- selection


def test_most_similar_by_hand():
    """Inner products with codes of norm 1: 1, 0.6, 0, -1; distances to (1, 0): 9, 0.894, 1.414, 2."""
    codes = torch.tensor([[10.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0]])
    assert most_similar(x, codes, 2).tolist() == [[0, 1]]
    assert most_similar(x, codes, 4).tolist() == [[0, 1, 2, 3]]
    assert most_similar(x, codes, 2, "euclidean").tolist() == [[1, 2]]
    blocked = torch.tensor([False, True, False, False])
    assert most_similar(x, codes, 2, "euclidean", blocked).tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="1 of 4 codes are blocked.*k=4"):
        most_similar(x, codes, 4, blocked=blocked)


@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_most_similar_equals_the_dense_formula(similarity, scale):
    x, codes = scale * rows(200).double(), scale * rows(50, seed=1).double() * (1 + torch.arange(50)[:, None] / 10)
    score = x @ normalize(codes, dim=1).T if similarity == "inner_product" else -torch.cdist(x, codes)
    assert torch.equal(most_similar(x, codes, 7, similarity), score.topk(7).indices.sort().values)


def test_rows_without_a_direction_still_get_k_codes():
    x = torch.tensor([[0.0] * 12, [float("nan")] * 12, [float("inf")] * 12])
    assert most_similar(x, rows(24), 3).shape == (3, 3)


@pytest.mark.parametrize("groups", [1, 4])
def test_output_depends_on_the_ids_alone(groups):
    layer, x = book(groups=groups), rows(50)
    near = x * 1.7  # the same directions
    ids, out = layer.select(x), layer.bottleneck(x)[0]
    assert torch.equal(layer.select(near), ids) and not torch.equal(near, x)
    assert torch.equal(layer.bottleneck(near)[0], out)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_output_by_hand(reduction):
    layer, x = book(groups=2, reduction=reduction), rows(5)
    ids = layer.select(x)
    assert ids.shape == (5, 6) and bool((ids.diff() > 0).all())
    assert bool((ids[:, :3] < 12).all()) and bool((ids[:, 3:] >= 12).all())
    parts = [layer.codes[ids[:, :3]], layer.codes[ids[:, 3:]]]
    want = torch.cat([getattr(part, reduction)(1) for part in parts], 1)
    torch.testing.assert_close(layer.bottleneck(x)[0], want)


def test_e22_all_codes_give_their_constant_mean():
    """Identity E22: k = all codes."""
    layer = book(k=24)
    out = layer.bottleneck(rows(9))[0]
    assert torch.equal(out, out[:1].expand_as(out))
    torch.testing.assert_close(out[0], layer.codes.mean(0))


def test_e22_one_group_is_the_vanilla_codebook():
    """Identity E22: a codebook of two groups is two codebooks, and with one group just one."""
    whole, x = book(groups=2), rows(20)
    halves = [book(6, d_sae=12) for _ in range(2)]
    for half, codes in zip(halves, whole.table.detach().split(12), strict=True):
        half.table.data.copy_(codes)
    want = torch.cat([half.bottleneck(part)[0] for half, part in zip(halves, x.split(6, 1), strict=True)], 1)
    assert torch.equal(whole.bottleneck(x)[0], want)
    plain, x = book(), rows(20)
    ids = (x @ normalize(plain.codes, dim=1).T).topk(3).indices
    torch.testing.assert_close(plain.bottleneck(x)[0], plain.codes[ids].mean(1))


@pytest.mark.parametrize("with_norm", [False, True])
def test_heads_are_independent(with_norm):
    layer, x = book(groups=4, with_norm=with_norm), rows(30)
    other = x.clone()
    other[:, 3:6] = rows(30, 3, seed=9)
    same = (layer.bottleneck(x)[0] == layer.bottleneck(other)[0]).all(0)
    assert same.tolist() == [True] * 3 + [False] * 3 + [True] * 6


def test_layer_norm_is_of_each_slice_with_gain_and_shift():
    layer, x = book(groups=3, with_norm=True), rows(8)
    assert layer.gain is not None and layer.shift is not None
    with torch.no_grad():
        layer.gain.mul_(2)
        layer.shift.add_(1)
    want = torch.cat([torch.nn.functional.layer_norm(part, (4,)) for part in x.split(4, 1)], 1) * 2 + 1
    torch.testing.assert_close(layer.norm(x), want)


# --- gradients


@pytest.mark.parametrize("kind", ["base", "aeloss", "fullaeloss", "vqvae"])
def test_gradients_of_every_kind(kind):
    """Straight through to the input; what codes and input learn besides, in closed form."""
    layer = book(gradient=kind, beta=0.5).double()
    x, g = rows(7).double().requires_grad_(), rows(7, seed=4).double()
    out, acts, loss = layer.bottleneck(x)
    q = layer.decode(acts).detach()
    assert torch.equal(out, q)
    ((out * g).sum() + loss).backward()
    pull = (x.detach() - q) * 2 * 0.5 / 7 if kind in ("fullaeloss", "vqvae") else 0.0
    torch.testing.assert_close(gradient(x), g + pull)
    if kind in ("base", "aeloss"):
        assert torch.equal(gradient(x), g)
    to_q = torch.zeros_like(g) if kind == "vqvae" else g
    to_q = to_q + (0 if kind == "base" else 2 * (q - x.detach()) / 7)
    want = torch.zeros_like(layer.codes).index_add(0, acts.features, to_q.repeat_interleave(3, 0) / 3)
    torch.testing.assert_close(gradient(layer.table), want)


def test_own_loss_by_hand():
    """|q - a|^2 = 4 on each of two tokens: 4 a token; the input's part counts beta."""
    a, q = torch.zeros(2, 4), torch.ones(2, 4)
    assert [codebook_loss(a, q, kind, 0.25, 2).item() for kind in ("base", "aeloss", "fullaeloss", "vqvae")] == [
        0,
        4,
        5,
        5,
    ]


def test_rotation_keeps_the_value_and_the_angle():
    a, q, g = (rows(20, seed=s).double() for s in range(3))
    a.requires_grad_()
    torch.testing.assert_close(rotation_trick(a, q), q)
    out = straight_through(a, q, "base", rotation=True)
    assert torch.equal(out, q)
    out.backward(g)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(gradient(a), a.detach()), cosine(g, q))
    ratio = q.norm(dim=1) / a.detach().norm(dim=1)
    torch.testing.assert_close(gradient(a).norm(dim=1), ratio * g.norm(dim=1))


def test_rotation_of_opposites_is_finite():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    out = rotation_trick(a, torch.tensor([[-2.0, -4.0], [1.0, 0.0]]))
    torch.testing.assert_close(out[0], torch.tensor([-2.0, -4.0]))
    out.sum().backward()
    assert bool(gradient(a).isfinite().all())


# --- where codes start, and how they come back


def test_drawn_inputs_are_rows():
    x = rows(10)
    drawn = draw_inputs(x, 10, generator_of(3, 5), rho=0.0)
    assert sorted(drawn.tolist()) == sorted(x.tolist())
    assert torch.equal(drawn, draw_inputs(x, 10, generator_of(3, 5), rho=0.0))
    assert not torch.equal(drawn, draw_inputs(x, 10, generator_of(3, 6), rho=0.0))
    noise = draw_inputs(x, 10, generator_of(3, 5)) - drawn
    assert 0 < float(noise.norm(dim=1).div(drawn.norm(dim=1)).max()) < 1e-3
    assert draw_inputs(x, 25, generator_of(0, 0)).shape == (25, 12) and draw_inputs(x, 0, generator_of(0, 0)).shape == (
        0,
        12,
    )


def test_kmeans_finds_clusters():
    centers = 10 * rows(4, seed=2)
    x = centers.repeat(50, 1) + 0.1 * rows(200, seed=3)
    codes = kmeans(x, 16, generator_of(0, 0))
    assert float(torch.cdist(x, codes).min(1).values.max()) < 1
    assert float(torch.cdist(centers, codes).min(1).values.max()) < 0.5


def test_unused_codes_become_inputs_when_it_is_time():
    layer, x = book(replace_every=2, start="normal").train(), rows(40)
    layer.bottleneck(x)
    used = layer.counts > 0
    with torch.no_grad():
        layer.table[5], used[5], layer.counts[5] = 100.0, False, 0
    before = layer.table.detach().clone()
    layer.after_step()
    layer.prepare(x)
    assert torch.equal(layer.table, before), "not yet"
    layer.after_step()
    layer.prepare(x)
    assert torch.equal(layer.table[used], before[used])
    fresh = layer.table[~used].detach()
    distance = torch.cdist(fresh, x)
    assert float(distance.min(1).values.max()) < 1e-2 and len(set(distance.argmin(1).tolist())) == len(fresh)
    assert int(layer.counts.sum()) == 0
    layer.prepare(x)
    assert torch.equal(layer.table[~used], fresh), "once a step"


def test_no_upkeep_outside_training():
    layer = book(replace_every=1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.bottleneck(rows(40))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_online_codebook_by_hand():
    """Two codes, all of a batch to the first: N = (0.01, 0); alpha = exp(-10 N 2 / 0.01 - 1e-3) = (2e-9, 0.999)."""
    usage = usage_after(torch.zeros(2), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(usage, torch.tensor([0.01, 0.0]))
    torch.testing.assert_close(usage_after(usage, torch.tensor([0, 1])), torch.tensor([0.0149, 0.005]))
    codes, anchors = torch.zeros(2, 3), torch.ones(2, 3)
    moved = towards_anchors(codes, usage, anchors)
    torch.testing.assert_close(moved[:, 0], torch.tensor([-20.001, -0.001]).exp())
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert closest_inputs(x, torch.tensor([[0.0, 1.0], [2.0, 0.1]]), "inner_product").tolist() == [[0, 3], [1, 0]]
    assert closest_inputs(x, torch.tensor([[0.0, 1.0], [0.0, 9.0]]), "euclidean").tolist() == [[1, 0], [0, 3]]


def test_online_codes_nothing_uses_go_to_inputs():
    layer, x = book(revive="online", start="normal", k=1).train(), 5 + rows(40)
    _, acts, _ = layer.bottleneck(x)
    unused = layer.usage == 0
    assert 0 < int(unused.sum()) < 24
    before = layer.table.detach().clone()
    layer.after_step()
    assert float(torch.cdist(layer.table[unused].detach(), x).min(1).values.max()) < 0.05
    busy = layer.usage > 0.0009
    assert bool(busy.any()) and float((layer.table.detach() - before)[busy].abs().max()) < 1e-4
    after = layer.table.detach().clone()
    layer.after_step()
    assert torch.equal(layer.table, after), "anchors serve one step"


def test_simvq_codes_are_one_map_of_frozen_ones():
    layer, x = book(revive="simvq", k=1, groups=2).double(), rows(3).double()
    frozen = layer.get_buffer("frozen")
    with torch.no_grad():
        layer.map.copy_(rows(2 * 6, 6, seed=3).double().view(2, 6, 6))
    torch.testing.assert_close(layer.codes, torch.cat([frozen[:12] @ layer.map[0], frozen[12:] @ layer.map[1]]))
    before = layer.codes.detach().clone()
    _, acts, loss = layer.bottleneck(x)
    loss.backward()
    with torch.no_grad():
        layer.map.sub_(0.1 * gradient(layer.map))
    moved = (layer.codes - before).norm(dim=1) > 0
    assert bool(moved.all()) and len(acts.features.unique()) < 24, "codes that nothing selected move too"
    assert {name for name, _ in layer.named_parameters()} == {"map"}
    wide = Codebook(CodebookConfig(4000, 1, revive="simvq"), 16, 1, False, 0)
    assert float(wide.get_buffer("frozen").std()) == pytest.approx(1 / 4, rel=0.05)


# --- the variant on cached activations


def test_loss_is_the_fvu_and_groups_read_their_slices():
    sae, x = CodebookSAE(CodebookConfig(24, 3, n_groups=2, normalize="none"), 12), rows(50)
    loss = sae.loss(Batch(x, x), info())
    out = sae(x)
    want = (out.x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    assert loss.total.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(loss.residual, (out.x_hat - x).detach())
    assert sae.W_dec.shape == (24, 12) and float(sae.W_dec.detach()[:12, 6:].abs().max()) == 0
    torch.testing.assert_close(out.acts.to_dense() @ sae.W_dec, out.x_hat)
    edited = out.acts.below(20)  # no longer k codes in each group
    torch.testing.assert_close(sae.decode(edited), edited.to_dense() @ sae.W_dec)
    assert bool((out.acts.values == torch.tensor(1 / 3)).all()) and out.acts.counts.tolist() == [6] * 50


@pytest.mark.parametrize("revive", ["replace", "online", "simvq", "none"])
def test_training_lowers_the_fvu_and_a_resume_is_bit_for_bit(tmp_path, revive, monkeypatch):
    x = rows(40, 8, seed=5).repeat(100, 1) + 0.3 * rows(4000, 8, seed=6)
    config = CodebookConfig(128, 1, revive=revive, replace_every=3, start="normal")
    options: dict[str, Any] = {"batch_size": 200, "warmup_steps": 1, "lr": 0.02, "log_every": 1, "checkpoint_every": 5}
    train = saelab.TrainConfig(n_tokens=4000, **options)
    whole = saelab.train(config, x, train, tmp_path / "whole", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]

    from saelab.training.sae_run import Run

    step, stop = Run.train_step, RuntimeError("stopped")

    def until_twelve(self, batch):
        if self.step == 12:
            raise stop
        step(self, batch)

    monkeypatch.setattr(Run, "train_step", until_twelve)
    with pytest.raises(RuntimeError, match="stopped"):
        saelab.train(config, x, train, tmp_path / "cut", progress=False)
    monkeypatch.setattr(Run, "train_step", step)
    again = saelab.train(config, x, train, tmp_path / "cut", progress=False)
    assert again.hash == whole.hash  # pyright: ignore[reportAttributeAccessIssue]
    assert saelab.load_sae(tmp_path / "cut").hash == again.hash  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CodebookConfig(10, 11), "k=11.*10 codes"),
        (lambda: CodebookConfig(10, 1, n_groups=3), "d_sae=10.*3 groups"),
        (lambda: CodebookConfig(12, 5, n_groups=3), "k=5.*4 codes of a group"),
        (lambda: CodebookConfig(10, 1, beta=-1.0), "beta=-1"),
        (lambda: CodebookConfig(10, 1, replace_every=0), "replace_every=0"),
        (lambda: CodebookSAE(CodebookConfig(12, 1, n_groups=3), 10), "d_in=10.*3 groups"),
    ],
)
def test_bad_configs_name_the_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_an_unknown_kind_is_named():
    for name in ("similarity", "reduction", "gradient", "start", "revive"):
        with pytest.raises((ValueError, TypeError), match="cosine"):  # TypeError: the tests' own check of types
            CodebookConfig(10, 1, **cast(Any, {name: "cosine"}))


# --- inside a model


@pytest.fixture
def own_lm(tiny_folder):
    """A tiny Llama of this test's own: finetuning changes it."""
    return saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")


CONFIG = CodebookConfig(64, 2, start="normal")
PROMPT = torch.tensor([[5, 17, 40, 99, 3, 210], [8, 8, 250, 31, 77, 1]])


def test_insert_and_remove_leave_the_model_unchanged(tiny_lm):
    before, weights = tiny_lm.logits(PROMPT), tiny_lm.hash
    with insert(tiny_lm, CONFIG, [HEADS, MLP, "blocks.2.hook_resid_mid", RESID]) as inserted:
        assert inserted.codebooks[HEADS].n_groups == 4 and inserted.codebooks[MLP].n_groups == 1
        assert not torch.allclose(tiny_lm.logits(PROMPT), before)
    assert torch.equal(tiny_lm.logits(PROMPT), before) and tiny_lm.hash == weights
    handle = insert(tiny_lm, CONFIG, MLP)
    handle.remove()
    handle.remove()
    assert not handle.active and torch.equal(tiny_lm.logits(PROMPT), before)


@pytest.mark.parametrize("hook", [HEADS, MLP, RESID, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"])
def test_the_model_goes_on_with_the_codes(tiny_lm, hook):
    """What stands at the hook is what the codebook makes of what stood there."""
    (plain,) = tiny_lm.stream_activations([PROMPT], [hook])
    with insert(tiny_lm, CONFIG, hook) as inserted:
        (got,) = tiny_lm.stream_activations([PROMPT], [hook])
        want = inserted.codebooks[hook].bottleneck(plain[hook].flatten(0, 1))[0]
        torch.testing.assert_close(got[hook].flatten(0, 1), want)
        assert inserted.codes(PROMPT)[hook].shape == (2, 6, 8 if hook == HEADS else 2)


@pytest.mark.parametrize("call", ["codes", "finetune"])
def test_a_codebook_that_the_pass_did_not_reach_is_an_error(tiny_lm, monkeypatch, call):
    """The layer is skipped; what the codebook kept of an earlier pass is not taken for this one's."""
    with insert(tiny_lm, CONFIG, RESID) as inserted:
        inserted.codes(PROMPT)
        layer = tiny_lm.backend.hook_places[RESID].module
        monkeypatch.setattr(
            type(layer), "__call__", lambda self, x, *a, **k: x if self is layer else self._call_impl(x, *a, **k)
        )
        with pytest.raises(ModelError, match=f"did not reach the codebook at '{RESID}'"):
            if call == "codes":
                inserted.codes(PROMPT[:, :3])
            else:
                finetune(tiny_lm, PROMPT, inserted, n_steps=1, batch_size=2, train_lm=False, progress=False)


def test_dropout_is_off_while_a_model_in_training_mode_is_finetuned(tiny_lm):
    model = copy.deepcopy(tiny_lm.model)
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(model.model.layers[0].mlp.act_fn, torch.nn.Dropout(0.5))
    lm = load_model(model.train(), tiny_lm.tokenizer)
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        losses += finetune(lm, PROMPT, n_steps=1, batch_size=2, lr=1e-12, progress=False)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and model.training


def test_a_cut_pass_leaves_nothing_behind(tiny_lm):
    """A capture at hook_resid_mid ends the pass before the layer's end, where the codebook's change is put back."""
    with insert(tiny_lm, CONFIG, "blocks.1.hook_resid_mid"):
        want = tiny_lm.logits(PROMPT)
        for _ in range(2):
            list(tiny_lm.stream_activations([PROMPT[:, :2]], ["blocks.1.hook_resid_mid"]))
        assert torch.equal(tiny_lm.logits(PROMPT), want)


def test_generation_with_codebooks_equals_the_whole_pass(tiny_lm):
    """With the key-value cache tokens come one by one: the same codes, as a row's codes do not depend on its batch."""
    with insert(tiny_lm, CONFIG, [HEADS, MLP]):
        made = tiny_lm.generate_ids(PROMPT[:1], max_new_tokens=5)
        best = tiny_lm.logits(made.ids[None])[0, made.n_prompt - 1 : -1].argmax(-1)
        assert best.tolist() == made.ids[made.n_prompt :].tolist()


def test_bad_inserts_name_the_value(tiny_lm):
    for hooks, config, says in (
        (["blocks.9.hook_mlp_out"], CONFIG, "blocks.9.hook_mlp_out"),
        ([MLP, MLP], CONFIG, "each only once"),
        ([], CONFIG, "at least one"),
        ([MLP], {RESID: CONFIG}, RESID),
        ([MLP], CodebookConfig(66, 2, n_groups=3), "d_in=32"),
    ):
        with pytest.raises(ValueError, match=says):
            insert(tiny_lm, config, hooks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_lm.model.modules())


@pytest.mark.parametrize("train_lm", [True, False])
def test_finetune_lowers_the_loss(own_lm, train_lm):
    texts = ["The river runs quietly past the old mill, and the light was good. " * 8] * 4
    weights = own_lm.hash
    with insert(own_lm, CodebookConfig(64, 4), [HEADS, MLP]) as inserted:
        options: dict[str, Any] = {"n_steps": 30, "batch_size": 4, "ctx_len": 32, "split": "all", "progress": False}
        losses = finetune(own_lm, texts, inserted, lr=5e-3, train_lm=train_lm, **options)
        assert len(losses) == 30 and losses[-1] < losses[0] - (1.0 if train_lm else 0.05)
        assert (own_lm.hash != weights) == train_lm
        assert not any(parameter.requires_grad for parameter in own_lm.model.parameters())
        assert not any(book.training for book in inserted.codebooks.values())
        assert all(int(book.step) == 30 for book in inserted.codebooks.values())


def test_finetune_is_the_same_on_one_seed(tiny_folder):
    def run(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        lm = saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")
        ids = torch.randint(300, (50, 16), generator=torch.Generator().manual_seed(0))
        with insert(lm, CodebookConfig(32, 2, replace_every=2), [MLP], seed) as inserted:
            losses = finetune(lm, ids, inserted, n_steps=6, batch_size=4, seed=seed, progress=False)
            return losses, inserted.codebooks[MLP].state_dict()

    (one, state), (same, again), (other, _) = run(1), run(1), run(2)
    assert one == same and all(torch.equal(state[name], again[name]) for name in state)
    assert one != other


def test_finetune_refuses_what_it_cannot_do(own_lm, tiny_folder):
    ids = PROMPT
    inserted = insert(own_lm, CONFIG, MLP)
    inserted.remove()
    with pytest.raises(ValueError, match="were removed"):
        finetune(own_lm, ids, inserted)
    with pytest.raises(ValueError, match="nothing to train"):
        finetune(own_lm, ids, train_lm=False, progress=False)
    with pytest.raises(ValueError, match="n_steps=0"):
        finetune(own_lm, ids, n_steps=0)
    with pytest.raises(ValueError, match="float32"):
        finetune(saelab.load_model(tiny_folder, dtype=torch.bfloat16, device="cpu"), ids)
    with pytest.raises(ValueError, match="no documents.*held_out"):
        finetune(own_lm, ["one text"] * 2, split="held_out")


# --- steering


@pytest.mark.parametrize("hook", [MLP, HEADS])
def test_a_forced_code_moves_the_output_by_the_difference(tiny_lm, hook):
    """By `(c_new - c_old) / k` at its position, in its group, and nowhere else."""
    with insert(tiny_lm, CONFIG, hook) as inserted:
        layer, ids = inserted.codebooks[hook].requires_grad_(False), inserted.codes(PROMPT)[hook]
        group = layer.n_groups - 1
        new = next(c for c in range(layer.d_sae - 1, 0, -1) if not bool((ids == c).any()))
        (before,) = tiny_lm.stream_activations([PROMPT], [hook])
        for slot in (-1, 0):
            with tiny_lm.steer(inserted.force(hook, new, 3, slot)):
                (after,) = tiny_lm.stream_activations([PROMPT], [hook])
            change = after[hook] - before[hook]
            assert bool((change[:, [0, 1, 2, 4, 5]] == 0).all())
            bottleneck = inserted.bottlenecks[hook]
            seen = bottleneck.seen
            assert seen is not None
            own = slice(group * layer.width, (group + 1) * layer.width)
            for b in range(2):
                candidates = ids[b, 3, group * 2 :]
                a = seen.unflatten(0, (2, 6))[b, 3, own]
                ranked = candidates[(normalize(layer.codes[candidates], dim=1) @ a).argsort(descending=True)]
                want = (layer.codes[new] - layer.codes[ranked[slot]]) / 2
                torch.testing.assert_close(change[b, 3, own], want, rtol=1e-4, atol=1e-6)
                assert float(change[b, 3].norm()) == pytest.approx(float(want.norm()), rel=1e-4)


def test_forcing_a_code_that_is_there_changes_no_bit(tiny_lm):
    with insert(tiny_lm, CONFIG, MLP) as inserted:
        code = int(inserted.codes(PROMPT)[MLP][0, 2, 0])
        before = tiny_lm.logits(PROMPT[:1])
        assert torch.equal(tiny_lm.run_with_edit(PROMPT[:1], inserted.force(MLP, code, 2)), before)
        assert not torch.equal(tiny_lm.run_with_edit(PROMPT[:1], inserted.force(MLP, code)), before)


def test_a_blocked_code_makes_way_for_the_next_best(tiny_lm):
    with insert(tiny_lm, CONFIG, MLP) as inserted:
        layer, ids = inserted.codebooks[MLP].requires_grad_(False), inserted.codes(PROMPT)[MLP]
        code = int(ids[0, 2, 0])
        (before,) = tiny_lm.stream_activations([PROMPT], [MLP])
        with tiny_lm.steer(inserted.block(MLP, code)):
            (refilled,) = tiny_lm.stream_activations([PROMPT], [MLP])
        with tiny_lm.steer(inserted.block(MLP, code, refill=False)):
            (dropped,) = tiny_lm.stream_activations([PROMPT], [MLP])
        seen = inserted.bottlenecks[MLP].seen
        assert seen is not None
        present = (ids == code).any(2)
        assert torch.equal((refilled[MLP] != before[MLP]).any(2), present)
        assert torch.equal((dropped[MLP] != before[MLP]).any(2), present)
        torch.testing.assert_close((before[MLP] - dropped[MLP])[0, 2], layer.codes[code] / 2)
        three = (normalize(layer.codes, dim=1) @ seen.unflatten(0, (2, 6))[0, 2]).topk(3).indices
        left = [c for c in three.tolist() if c != code]
        torch.testing.assert_close(refilled[MLP][0, 2], layer.codes[left].mean(0))


def test_bad_steering_names_the_value(tiny_lm):
    with insert(tiny_lm, CONFIG, MLP) as inserted:
        for make, says in (
            (lambda: inserted.force(RESID, 1), RESID),
            (lambda: inserted.force(MLP, 64), "code=64"),
            (lambda: inserted.force(MLP, 1, -2), "position=-2"),
            (lambda: inserted.force(MLP, 1, slot=2), "slot=2"),
        ):
            with pytest.raises(ValueError, match=says):
                make()
    with pytest.raises(ValueError, match="insert it again"):
        tiny_lm.run_with_edit(PROMPT, inserted.force(MLP, 1))


def test_find_codes_by_hand():
    """Code 1 on all 3 meant tokens and one other; code 2 on one meant token only; code 0 on none."""
    ids = torch.tensor([[[1, 2], [1, 3], [1, 3]], [[0, 1], [0, 3], [0, 3]]])
    meant = torch.tensor([[True, True, True], [False, False, False]])
    found = find_codes(ids, meant, 5)
    assert [(m.code, m.precision, round(m.recall, 4), m.count) for m in found] == [
        (2, 1.0, 0.3333, 1),
        (1, 0.75, 1.0, 4),
        (3, 0.5, 0.6667, 4),
    ]
    assert [m.code for m in find_codes(ids, meant, 5, min_recall=0.5)] == [1, 3]
    with pytest.raises(ValueError, match="is false everywhere"):
        find_codes(ids, meant & False, 5)


# --- on disk


@pytest.mark.parametrize("train_lm", [True, False])
def test_save_and_load_are_bit_equal(tmp_path, tiny_folder, own_lm, train_lm):
    ids = torch.randint(300, (20, 16), generator=torch.Generator().manual_seed(0))
    inserted = insert(own_lm, {HEADS: CONFIG, MLP: CodebookConfig(32, 1, revive="simvq")}, [HEADS, MLP])
    finetune(own_lm, ids, inserted, n_steps=3, batch_size=4, train_lm=train_lm, progress=False)
    want = own_lm.logits(PROMPT)
    save(inserted, tmp_path / "books")
    files = {path.name for path in (tmp_path / "books").iterdir()}
    assert files == {"codebooks.json", "codebooks.safetensors"} | ({"model.safetensors"} if train_lm else set())
    fresh = saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")
    back = load(fresh, tmp_path / "books")
    assert torch.equal(fresh.logits(PROMPT), want) and fresh.hash == own_lm.hash
    assert {name: book.config for name, book in back.codebooks.items()} == {
        name: book.config for name, book in inserted.codebooks.items()
    }
    save(back, tmp_path / "again")
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "books" / name).read_bytes()


def test_load_refuses_what_does_not_fit(tmp_path, tiny_folder, own_lm):
    inserted = insert(own_lm, CONFIG, MLP)
    finetune(own_lm, PROMPT, inserted, n_steps=1, batch_size=2, progress=False)
    folder = save(inserted, tmp_path / "books")
    with pytest.raises(SaelabError, match="belongs to the model"):
        load(own_lm, folder)  # it was trained: no longer the base
    fresh = saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")
    before = fresh.logits(PROMPT)
    path = folder / "codebooks.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + b"\x01" * 8)
    with pytest.raises(SaelabError, match="codebooks.safetensors was altered"):
        load(fresh, folder)
    path.write_bytes(whole[:-8])
    with pytest.raises(SaelabError, match="truncated"):
        load(fresh, folder)
    path.write_bytes(whole)
    meta = json.loads((folder / "codebooks.json").read_text())
    meta["configs"][MLP]["d_sae"] = 32
    (folder / "codebooks.json").write_text(json.dumps(meta))
    with pytest.raises(SaelabError, match="does not fit"):
        load(fresh, folder)
    assert torch.equal(fresh.logits(PROMPT), before)


def test_attached_functions_run_in_order(tiny_lm):
    seen: list[int] = []
    handles = [h for i in range(3) for h in attach(tiny_lm.backend.hook_places[MLP], lambda x, i=i: seen.append(i))]
    tiny_lm.logits(PROMPT)
    for handle in handles:
        handle.remove()
    assert seen == [0, 1, 2]
