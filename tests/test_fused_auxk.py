"""AuxK in the fused step: the loss and gradients of `losses.auxk`, whatever room there is for the dead features; no wait."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_fused_step import (
    DEVICE,
    SHORT,
    batch,
    by_dense_products,
    compare,
    make_small,
    mostly_negative,
    trained,
)

from saelab.distributed.mesh import Mesh
from saelab.errors import TrainingError
from saelab.kernels.dispatch import using
from saelab.kernels.triton_backend.step import auxk as kernels
from saelab.kernels.triton_backend.step import bucket
from saelab.kernels.triton_backend.step.auxk import Weights, add_auxk, empty_aux
from saelab.kernels.triton_backend.step.bucket import capacity_for, keep_largest
from saelab.kernels.triton_backend.step.gradients import Gradients
from saelab.losses import auxk
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.step import RULES
from saelab.training import fused_step
from saelab.training.cuda_graph import Replayed
from saelab.training.dead_bound import DeadBound
from saelab.training.dead_features import DeadFeatures
from saelab.training.steps import AutogradTraining, FusedTraining, Trained

D_SAE, D_IN, WINDOW, ALPHA = 40, 20, 100, 0.25


def make_smaller(monkeypatch):
    """Rooms of several sizes, too."""
    make_small(monkeypatch)
    monkeypatch.setattr(bucket, "_LEAST", 4)
    monkeypatch.setattr(bucket, "_ALIGNED", 4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_smaller(monkeypatch)


def case(n_dead, n_rows=21, seed=0):
    """Rows, residual, weights and counters of which `n_dead` are at the window or beyond it."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, W_enc, W_dec = (
        torch.randn(n, D_IN, generator=generator).to(DEVICE) for n in (n_rows, n_rows, D_SAE, D_SAE)
    )
    since = torch.randint(0, WINDOW, (D_SAE,), generator=generator)
    chosen = torch.randperm(D_SAE, generator=generator)[:n_dead]
    since[chosen] = WINDOW + torch.randint(0, 2, (n_dead,), generator=generator)
    weights = Weights(W_enc, torch.randn(D_SAE, generator=generator).to(DEVICE), W_dec)
    return x, residual, weights, since.to(DEVICE)


def by_kernels(x, residual, weights, since, k_aux, capacity):
    """Loss and gradients, added to gradients of ones, from memory that held NaN and ids that do not exist."""
    aux = empty_aux(capacity, k_aux, ALPHA, x)
    for memory in (aux.bucket.feature_acts, aux.bucket.dacts, aux.difference, aux.losses):
        memory.fill_(float("nan"))
    aux.bucket.ids.fill_(2**30)
    gradients = Gradients(
        torch.ones_like(weights.W_enc), torch.ones_like(weights.W_dec), torch.ones_like(weights.b_enc)
    )
    add_auxk(x, residual, residual.square().sum(), weights, (since, WINDOW), aux, gradients)
    return aux.losses.sum(), *gradients


def by_autograd(x, residual, weights, since, k_aux, dtype=torch.float64):
    x, residual, W_enc, b_enc, W_dec = (one.to(dtype) for one in (x, residual, *weights))
    parameters = [p.requires_grad_() for p in (W_enc, W_dec, b_enc)]
    dead = (since >= WINDOW).nonzero().squeeze(1)
    loss = auxk(x, -residual, W_enc[dead], b_enc[dead], W_dec[dead], k_aux)
    if not len(dead):
        return loss, *(torch.ones_like(p) for p in parameters)
    return loss.detach(), *(1 + g for g in torch.autograd.grad(ALPHA * loss, parameters))


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n_dead", "k_aux"), [(0, 3), (1, 3), (5, 3), (5, 5), (5, 10), (17, 10), (33, 4), (40, 10), (40, 1)]
)
def test_loss_and_gradients_are_those_of_autograd(n_dead, k_aux):
    data = case(n_dead)
    assert_same(by_kernels(*data, k_aux, capacity_for(max(n_dead, 1), D_SAE)), by_autograd(*data, k_aux))


@pytest.mark.parametrize("n_dead", [5, 17])
def test_no_bit_depends_on_the_capacity_or_the_slices(monkeypatch, n_dead):
    data = case(n_dead, n_rows=18)
    usual = by_kernels(*data, 4, capacity_for(max(n_dead, 1), D_SAE))
    for most, capacity, n_slices in ((1 << 27, 40, 1), (1, 20, 2)):
        monkeypatch.setattr(kernels, "_MOST", most)
        assert len(empty_aux(capacity, 4, ALPHA, data[0]).slices) == n_slices
        got = by_kernels(*data, 4, capacity)
        assert all(torch.equal(one, other) for one, other in zip(got, usual, strict=True)), (most, capacity)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy runs the kernels
@pytest.mark.parametrize("where", ["x", "W_enc", "W_dec", "alive"])
def test_nan_reaches_what_it_reaches_by_autograd(where):
    x, residual, weights, since = case(6)
    dead = since >= WINDOW
    if where == "x":
        x[3, 5] = float("nan")
    else:
        matrix = weights.W_dec if where == "W_dec" else weights.W_enc
        matrix[(dead if where != "alive" else ~dead).nonzero()[0], 2] = float("nan")
    got, want = (by(x, residual, weights, since, 3) for by in (partial(by_kernels, capacity=8), by_autograd))
    assert bool(got[0].isnan()) == bool(want[0].isnan()) == (where != "alive")
    if where == "alive":
        assert_same(got, want)


@pytest.mark.parametrize("level", [0.0, 1.0, 1000.0])
def test_nothing_left_to_explain_is_no_loss(level):
    x, _, weights, since = case(6)
    residual = torch.full_like(x, level) * torch.linspace(0.3, 1.7, D_IN, device=DEVICE)
    got = by_kernels(x, residual, weights, since, 3, 8)
    assert_same(got, by_autograd(x, residual, weights, since, 3, torch.float32))
    assert got[0] == 0 and all(torch.equal(g, torch.ones_like(g)) for g in got[1:])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 7, 2000])
def test_of_equal_activations_the_first_are_kept(k):
    nan = float("nan")
    acts = torch.tensor([[2.0, 1.0, 2.0, 0.0, 1.0, 2.0, 1e-42, 9.0], [nan, 3.0, nan, 3.0, nan, 0.5, 0.0, 9.0]])
    acts = torch.cat([acts, torch.zeros(2, 2000)], 1).to(DEVICE)
    count = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    order = acts[:, :7].nan_to_num(1e9).sort(dim=1, descending=True, stable=True).indices
    want = torch.zeros_like(acts[:, :7]).scatter(1, order[:, :k], acts[:, :7].gather(1, order[:, :k]))
    keep_largest(acts, count, k)
    torch.testing.assert_close(acts[:, :7], want, rtol=0, atol=0, equal_nan=True)
    assert (acts[:, 7] == 9).all(), "what lies beyond the number of dead features is not touched"


def test_many_features_are_listed_and_selected_among():
    """More than a program lists, or reads at a time, of counters beyond 32 bits."""
    n, window = 9000, 2**40
    generator = torch.Generator().manual_seed(3)
    since = torch.where(torch.rand(n, generator=generator) < 0.3, window, window - 1).to(DEVICE)
    aux = empty_aux(4096, 700, ALPHA, torch.empty(2, 4, device=DEVICE))
    kernels.list_dead(since, window, aux.bucket)
    ids = (since >= window).nonzero().squeeze(1)
    assert int(aux.bucket.count) == len(ids) and torch.equal(aux.bucket.ids[: len(ids)].long(), ids)
    values = torch.randint(0, 50, (2, 4096), generator=generator).float().to(DEVICE)
    kept = values.clone()
    keep_largest(kept, aux.bucket.count, 700)
    for before, after in zip(values[:, : len(ids)], kept[:, : len(ids)], strict=True):
        best = before.sort(descending=True, stable=True).indices[:700]
        assert torch.equal(after, torch.zeros_like(before).scatter(0, best, before[best]))


STEPS = {
    "fewer than k_aux": (None, {"k_aux": 19}),
    "one": (None, {"k_aux": 1}),
    "some": (None, {"k_aux": 5, "pre_bias": False}),
    "dense": (by_dense_products, {"k_aux": 5, "rtol": 1e-2}),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_with_dead_features_is_that_of_autograd(monkeypatch, case):
    patch, options = STEPS[case]
    if patch is not None:
        patch(monkeypatch)
    fused, _ = compare(change=mostly_negative, window=6, n_steps=2, **options)
    assert fused.record[fused_step.RECORD.index("auxk")] > 0


def stepped(n_steps=8, fused=True):
    """A training in which first few features are dead, then many, then few: its SAE, metrics and the room of each step."""
    sae, adam, dead = trained(12, 24, 3, window=20, k_aux=3)
    sae.b_enc.data[3:] = -9.0
    dead.tokens_since_fired[5:9] = 8
    config = dataclasses.replace(SHORT, batch_size=6, n_tokens=6 * 100)
    of = Trained(sae, adam, dead, HooksUsed(("hook",), ("hook",)), config, Mesh(), None, DEVICE, RULES)
    found, rooms = [], []
    with using("triton" if fused else "torch"):
        step = FusedTraining(of) if fused else AutogradTraining(of)
        for n in range(n_steps):
            found += step({"hook": batch(6, 12, n)}, n, 1e-2, logged=True)
            rooms += [step.fused.dead_room] if isinstance(step, FusedTraining) else []
            if n == 4:
                dead.tokens_since_fired[[*range(5), *range(9, 24)]] = 0
        found += step.settle(n_steps)
    assert [n for n, _ in found] == list(range(n_steps))
    return sae, [values for _, values in found], rooms


@pytest.fixture(scope="module")
def usual():
    with pytest.MonkeyPatch.context() as patch:
        make_smaller(patch)
        return stepped()


def test_room_grows_and_shrinks_and_changes_no_bit(monkeypatch, usual):
    sae, metrics, rooms = usual
    assert rooms == [4, 4, 4, 24, 24, 24, 24, 4]
    forgotten = []
    monkeypatch.setattr(Replayed, "forget", lambda replayed: forgotten.append(replayed))
    monkeypatch.setattr(fused_step, "capacity_for", lambda n_dead, d_sae: d_sae)
    other, its_metrics, _ = stepped()
    assert metrics == its_metrics
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), other.parameters(), strict=True))
    assert len(forgotten) == 1


def test_a_graph_is_forgotten_with_the_room_that_it_works_on(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("waited"))
    replayed = Replayed(lambda: done.append("launched"), torch.device("cpu"))
    monkeypatch.setattr(replayed, "_graph", SimpleNamespace(replay=lambda: done.append("replayed")))
    for act in (replayed, replayed.forget, replayed, replayed.forget):
        act()
    assert done == ["replayed", "waited", "launched"]


def test_training_with_dead_features_is_that_of_autograd(usual):
    sae, metrics, _ = usual
    plain, plain_metrics, _ = stepped(fused=False)
    assert [values.get("dead_fraction_train") * 24 for values in metrics] == [0, 4, 4, 21, 21, 4, 4, 4]
    for ours, theirs in zip(metrics, plain_metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)  # "auxk" in the same steps too
    for ours, theirs in zip(sae.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_too_little_room_is_noticed(monkeypatch):
    monkeypatch.setattr(fused_step, "HORIZON", 0)  # a record then vouches for one step only
    with pytest.raises(
        TrainingError, match=r"Step 2 began with 4 dead features but had room for 0: .* checkpoint is intact"
    ):
        stepped()


def test_a_bound_before_and_after_records():
    dead = DeadFeatures(5, 100, torch.device("cpu"))
    dead.tokens_since_fired[:4] = torch.tensor([100, 90, 80, 79])
    bound = DeadBound(dead, 20)
    assert bound.at_most == 3
    bound.note_room(0)
    bound.forget_rooms()
    bound.note_room(4)
    bound.note_room(0)
    assert bound.read(0, 0, 2) == 1
    assert bound.at_most == 2
    assert bound.read(1, 1, 2) == 0
    bound.note_room(0)
    with pytest.raises(TrainingError, match="Step 2 began with 1 dead features but had room for 0"):
        bound.read(2, 0, 0)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="records graphs")
def test_graphs_with_rooms_of_every_size_have_the_bits_of_their_launches(monkeypatch, usual):
    monkeypatch.setenv("SAELAB_GRAPHS", "0")
    sae, metrics, rooms = stepped()
    assert (metrics, rooms) == usual[1:]
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), usual[0].parameters(), strict=True))
