"""The fused step computes what autograd and `apply_step` compute, exactly selected, whatever the data; and it never waits."""

import dataclasses
import shutil

import pytest
import torch
from fused_cases import (
    all_negative,
    by_feature,
    equal_features,
    finish_in_torch,
    in_parts,
    mostly_negative,
    on_every_token,
)

from saelab import TrainConfig, train
from saelab.distributed.mesh import Mesh
from saelab.errors import TrainingError
from saelab.kernels.dispatch import using
from saelab.kernels.triton_backend.step import candidates, gradients, update
from saelab.saes import (
    AbsTopKConfig,
    AbsTopKSAE,
    BatchTopKConfig,
    BatchTopKSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    MatryoshkaConfig,
    MatryoshkaSAE,
    ReLUConfig,
    ReLUSAE,
    TopKConfig,
    TopKSAE,
)
from saelab.saes.step import RULES, Batch, StepInfo
from saelab.training import fused_step, steps
from saelab.training.adam import Adam
from saelab.training.cuda_graph import Replayed, wanted
from saelab.training.dead_bound import DeadBound
from saelab.training.dead_features import DeadFeatures
from saelab.training.fused_step import FusedStep
from saelab.training.late_records import LAG, LateRecords
from saelab.training.optimizer import apply_step
from saelab.training.steps import Trained, fused_serves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # there compiled, here in the interpreter


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def make_small(monkeypatch):
    """The sizes of these tests would all be dense, and their runs end before a record had anything to say."""
    monkeypatch.setattr(fused_step, "dense_pays", lambda d_sae, k: False)
    monkeypatch.setattr(fused_step, "HORIZON", 2)
    monkeypatch.setattr(steps, "LAG", 1)
    finish_in_torch(monkeypatch)


def trained(d_in, d_sae, k, window=10**9, **options):
    """An SAE away from its start, its optimiser and its counters."""
    sae = TopKSAE(TopKConfig(d_sae=d_sae, k=k, **options), d_in)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        sae.center.copy_(torch.randn(d_in, generator=generator))
        sae.scale.fill_(0.7)
    sae.to(DEVICE)
    return sae, Adam(sae.parameters(), sae.weight_decay), DeadFeatures(d_sae, window, DEVICE)


def batch(n_rows, d_in, seed):
    return 2 * torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def by_autograd(sae, adam, dead, x, step, lr=1e-2):
    """The step of `AutogradTraining`, in PyTorch; returns the loss and the gradient norm."""
    with using("torch"):
        loss = sae.loss(Batch(x, x), StepInfo(dead.dead, step, 100))
        loss.total.backward()
        dead.update(loss.feature_acts)
        return loss, apply_step(sae, adam, lr, 1.0)


def dense(selection, d_sae):
    """The selection as a matrix, from its slots."""
    out = torch.zeros(len(selection.values), d_sae, device=DEVICE)
    return out.scatter_add_(1, selection.features.long(), selection.values)


def compare(n_steps=1, change=lambda sae: None, n_rows=6, d_in=12, d_sae=20, k=3, lr=1e-2, rtol=1e-4, **options):
    """Both steps on the same batches; returns the fused step and the sum of its uncertain rows."""
    ours, adam, dead = trained(d_in, d_sae, k, **options)
    theirs, its_adam, its_dead = trained(d_in, d_sae, k, **options)
    for sae in (ours, theirs):
        change(sae)
    fused, uncertain = FusedStep(ours, adam, dead, n_rows, 1.0), 0.0
    for step in range(n_steps):
        x = batch(n_rows, d_in, step)
        ids = dead.dead.nonzero().squeeze(1)
        loss, norm = by_autograd(theirs, its_adam, its_dead, x, step, lr)
        fused.load(x, lr, step)
        fused.make_dead_room(max(len(ids), 1))
        fused.run(with_aux=bool(len(ids)))
        record = dict(zip(update.RECORD, fused.record.tolist(), strict=True))
        uncertain += record["uncertain"]
        want = loss.feature_acts.to_dense()
        assert torch.equal(dense(fused.selection, d_sae) != 0, want != 0), "other pairs are kept"
        torch.testing.assert_close(dense(fused.selection, d_sae), want, rtol=rtol, atol=rtol / 10)
        assert record["fvu"] == pytest.approx(loss.terms["fvu"].item(), rel=rtol)
        assert record["grad_norm"] == pytest.approx(norm, rel=rtol)
        assert record["nnz"] == loss.feature_acts.nnz
        assert torch.equal(dead.tokens_since_fired, its_dead.tokens_since_fired)
        assert record["dead"] == int(dead.dead.sum())
        if len(ids):
            assert record["auxk"] == pytest.approx(loss.terms["auxk"].item(), rel=rtol)
    if change is beyond_half_precision:  # Adam makes whole steps of gradients that are rounding errors
        return fused, uncertain
    for (name, got), parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            got, parameter, rtol=rtol, atol=0.3 * rtol, msg=lambda text, name=name: f"{name}: {text}"
        )
    return fused, uncertain


def no_candidates(monkeypatch):
    monkeypatch.setattr(candidates, "MARGIN", -1000.0)


def few_slots(monkeypatch):
    monkeypatch.setattr(candidates, "slots_for", lambda k: 4)
    monkeypatch.setattr(candidates, "MARGIN", 500.0)


def short_chunks(monkeypatch):
    monkeypatch.setattr(gradients, "CHUNK", 4)


def by_dense_products(monkeypatch):
    monkeypatch.setattr(fused_step, "dense_pays", lambda d_sae, k: True)


def by_dense_products_without_candidates(monkeypatch):
    by_dense_products(monkeypatch)
    no_candidates(monkeypatch)


def beyond_half_precision(sae):
    sae.W_enc.data[5] *= 1e6


CASES = {
    "plain": (None, None, {"n_steps": 3}),
    "no candidates": (no_candidates, None, {}),
    "too few slots": (few_slots, None, {}),
    "by feature": (by_feature, None, {}),
    "features over several chunks": (short_chunks, on_every_token, {}),
    "scores in parts": (in_parts, None, {}),
    "equal features": (None, equal_features, {}),
    "fewer than k": (None, mostly_negative, {}),
    "nothing fires": (None, all_negative, {}),
    "weights beyond fp16": (None, beyond_half_precision, {}),
    "no pre-bias, with decay": (None, None, {"pre_bias": False, "encoder_decay": 0.5}),
    "odd sizes": (None, None, {"n_rows": 5, "d_in": 33, "d_sae": 19, "k": 5}),
    "k is d_sae": (None, None, {"n_rows": 5, "d_in": 16, "d_sae": 8, "k": 8}),
    "dense": (by_dense_products, None, {"rtol": 1e-2, "n_steps": 2}),
    "dense, no candidates": (by_dense_products_without_candidates, None, {"rtol": 1e-2}),
    "dense, equal features": (by_dense_products, equal_features, {"rtol": 1e-2}),
    "dense, fewer than k": (by_dense_products, mostly_negative, {"rtol": 1e-2, "pre_bias": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_step_of_autograd(monkeypatch, case):
    patch, change, options = CASES[case]
    if patch is not None:
        patch(monkeypatch)
    fused, uncertain = compare(change=change or (lambda sae: None), **options)
    if case in ("no candidates", "too few slots", "dense, no candidates"):
        assert uncertain, "the search through all features was not needed"
    assert float(fused.sae.W_dec.detach().norm(dim=1).sub(1).abs().max()) < 1e-6


def test_a_gradient_that_is_not_finite_changes_no_weight():
    sae, adam, dead = trained(12, 20, 3)
    fused, before = FusedStep(sae, adam, dead, 6, 1.0), [p.detach().clone() for p in sae.parameters()]
    x = batch(6, 12, 0)
    x[3, 5] = float("nan")
    fused.load(x, 1e-2, 0)
    fused.run()
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), before, strict=True))
    assert not torch.isfinite(fused.record[update.RECORD.index("grad_norm")])


@pytest.mark.parametrize("shape", [(6, 11), (5, 12), (7, 12)])
def test_rows_of_another_shape_are_refused(shape):
    fused = FusedStep(*trained(12, 20, 3), 6, 1.0)
    with pytest.raises(ValueError, match=rf"d_in=12, 6 rows a batch; got a tensor of shape \({shape[0]}, {shape[1]}\)"):
        fused.load(batch(shape[0], shape[1], 0), 1e-2, 0)


def test_rows_of_any_float_dtype_are_read():
    fused = FusedStep(*trained(12, 20, 3), 6, 1.0)
    x = batch(6, 12, 0).bfloat16()
    seen = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        fused.load(x.to(dtype), 1e-2, 0)
        seen.append(fused.rows.x.clone())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


CONFIG = TopKConfig(d_sae=24, k=2)
SHORT = TrainConfig(
    n_tokens=6 * 8,
    batch_size=6,
    warmup_steps=2,
    lr=1e-2,
    log_every=3,
    device=DEVICE.type,
    checkpoint_every=4,
    dead_after_tokens=26,
)
"""Some features are dead from step 5 on; until step 3 the records of the first steps rule it out."""


def rows(n=96):
    return batch(n, 8, 7).cpu() @ torch.randn(8, 8, generator=torch.Generator().manual_seed(8))


def run(folder):
    """Train with the fused step, in the interpreter."""
    with using("triton"):
        return train(CONFIG, rows(), SHORT, folder, progress=False)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run that nothing interrupts, its folder and its SAE."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        folder = tmp_path_factory.mktemp("fused") / "full"
        return folder, run(folder)


def interrupt_at(monkeypatch, at):
    real = FusedStep.load

    def load(self, x, lr, step):
        if step == at:
            raise KeyboardInterrupt
        real(self, x, lr, step)

    monkeypatch.setattr(FusedStep, "load", load)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The folder of the same run, interrupted before step 5. Do not change it."""
    folder = tmp_path_factory.mktemp("fused") / "cut"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    return folder


def lines(folder):
    from saelab.training.metrics_log import read_lines

    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_lines(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("room", [None, 64])
def test_a_run_is_logged_in_full_and_resumes_bit_for_bit(tmp_path, monkeypatch, full, cut, room):
    """What a resumed run knows of the dead features, and so whether there is room for any and how much, changes no bit."""
    folder, sae = full
    shutil.copytree(cut, tmp_path / "cut")
    if room is not None:
        monkeypatch.setattr(fused_step, "capacity_for", lambda n_dead, d_sae: room)
        monkeypatch.setattr(DeadBound, "at_most", property(lambda self: 1, lambda self, value: None), raising=False)
    assert run(tmp_path / "cut").hash == sae.hash
    assert lines(tmp_path / "cut") == lines(folder)
    assert [line["step"] for line in lines(folder)] == [0, 3, 6, 7]
    assert ["auxk" in line for line in lines(folder)] == [False, False, True, True]


def test_a_run_ends_as_one_by_autograd(tmp_path, full):
    folder, sae = full
    plain = train(CONFIG, rows(), SHORT, tmp_path, progress=False)
    torch.testing.assert_close(sae.W_dec, plain.W_dec, rtol=0, atol=1e-3)
    for ours, theirs in zip(lines(folder), lines(tmp_path), strict=True):
        assert set(ours) == set(theirs)
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy runs the kernels
def test_a_bad_batch_is_named_though_it_is_noticed_later(tmp_path):
    def batches():
        for seed in range(9):
            x = batch(6, 8, seed).cpu()
            if seed == 2:
                x[5, 3] = float("inf")
            yield x

    config = dataclasses.replace(SHORT, n_tokens=6 * 4, checkpoint_every=2)
    with (
        using("triton"),
        pytest.raises(TrainingError, match=r"stopped at step 2: 1 of 6 activations in batch 2 .* step 2 "),
    ):
        train(CONFIG, batches(), config, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"config": {"normalize": "none"}}, True),
        ({"config": {"multi_topk": True}}, False),
        ({"config": {"select": "groupmax"}}, False),
        ({"config": {"score": "decoder_norm"}}, True),
        ({"config": {"score": "decoder_norm"}, "rules": 5}, False),
        ({"config": {"aux": "aux_zipf"}}, False),
        ({"config": {"k_start": 6}}, False),
        ({"sae": BatchTopKSAE(BatchTopKConfig(d_sae=12, k=2, k_start=6), 8)}, False),
        ({"config": {"normalize": "layer_norm"}}, False),
        ({"train": {"grad_accumulation": 2}}, False),
        ({"running": "some"}, False),
        ({"rules": 5}, True),
        ({"rules": 4}, False),
        ({"sae": MatryoshkaSAE(MatryoshkaConfig(d_sae=12, k=2), 8)}, False),
        ({"sae": AbsTopKSAE(AbsTopKConfig(d_sae=12, k=2), 8)}, True),
        ({"sae": AbsTopKSAE(AbsTopKConfig(d_sae=12, k=2), 8), "rules": 5}, False),
        ({"sae": BatchTopKSAE(BatchTopKConfig(d_sae=12, k=2), 8)}, True),
        ({"sae": BatchTopKSAE(BatchTopKConfig(d_sae=12, k=2), 8), "rules": 5}, False),
        ({"sae": BatchTopKSAE(BatchTopKConfig(d_sae=12, k=2, aux="aux_zipf"), 8)}, False),
        ({"sae": ReLUSAE(ReLUConfig(d_sae=12), 8)}, True),
        ({"sae": ReLUSAE(ReLUConfig(d_sae=12), 8), "rules": 5}, False),
        ({"sae": JumpReLUSAE(JumpReLUConfig(d_sae=12), 8)}, True),
        ({"sae": JumpReLUSAE(JumpReLUConfig(d_sae=12), 8), "rules": 5}, False),
    ],
)
def test_which_runs_take_it(change, expected):
    config, changed = dataclasses.replace(CONFIG, **change.pop("config", {})), change.pop("train", {})
    defaults = {"mesh": Mesh(), "running": None, "rules": RULES, "sae": TopKSAE(config, 8), "adam": None, "dead": None}
    of = Trained(
        **defaults | {"hooks": None, "device": DEVICE, "train": dataclasses.replace(SHORT, **changed)} | change
    )
    with using("triton"):
        assert fused_serves(of) is expected
    with using("torch"):
        assert fused_serves(of) is False


def test_records_come_in_order_and_none_is_lost():
    records = LateRecords()
    numbers = torch.zeros(1)
    taken = []
    for step in range(10):
        numbers.fill_(step)
        records.push(step, numbers, with_aux=step % 2 == 0)
        taken += records.take(LAG)
        assert len(taken) == max(0, step + 1 - LAG)
    taken += records.take(0)
    assert [(one.step, float(one.numbers), one.with_aux) for one in taken] == [(i, i, i % 2 == 0) for i in range(10)]


@pytest.mark.parametrize(("value", "answer"), [(None, True), ("1", True), ("0", False)])
def test_graphs_can_be_turned_off(monkeypatch, value, answer):
    monkeypatch.delenv("SAELAB_GRAPHS", raising=False)
    if value is not None:
        monkeypatch.setenv("SAELAB_GRAPHS", value)
    assert wanted() is answer
    monkeypatch.setenv("SAELAB_GRAPHS", "yes")
    with pytest.raises(ValueError, match="SAELAB_GRAPHS='yes' must be 1"):
        wanted()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="records a graph")
@pytest.mark.parametrize("is_dense", [False, True])
def test_a_graph_has_the_bits_of_its_launches(monkeypatch, is_dense):
    monkeypatch.setattr(fused_step, "dense_pays", lambda d_sae, k: is_dense)
    bits = {}
    for value in ("1", "0"):
        monkeypatch.setenv("SAELAB_GRAPHS", value)
        sae, adam, dead = trained(64, 512, 8)
        fused = FusedStep(sae, adam, dead, 128, 1.0)
        replayed = Replayed(fused.run, DEVICE)
        for step in range(6):
            fused.load(batch(128, 64, step), 1e-2, step)
            replayed()
        bits[value] = [p.detach().clone() for p in (*sae.parameters(), fused.record)]
    assert all(torch.equal(p, q) for p, q in zip(bits["1"], bits["0"], strict=True))


def test_a_cpu_records_nothing():
    calls = []
    replayed = Replayed(lambda: calls.append(1), torch.device("cpu"))
    for _ in range(5):
        replayed()
    assert len(calls) == 5
