"""A fused step beside the general one, in PyTorch and in float64 with dense formulas, for SAEs of any variant."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from counted import counted

from saelab import TrainConfig
from saelab.distributed.mesh import Mesh
from saelab.kernels.dispatch import using
from saelab.kernels.triton_backend.step import products
from saelab.saes import VARIANTS
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.step import RULES, Batch, StepInfo
from saelab.training import fused_step
from saelab.training.adam import Adam
from saelab.training.dead_features import DeadFeatures
from saelab.training.sae_run import Run
from saelab.training.steps import AutogradTraining, FusedTraining, Trained, make_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # there compiled, here in the interpreter
HOOKS = HooksUsed(("hook",), ("hook",))
_WINDOW = 10**9


def an_sae(config: Any, d_in: int):
    """An SAE away from its start."""
    variant = next(one for one in VARIANTS.values() if one.Config is type(config))
    sae: Any = variant(config, d_in)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec"):
            parameter = getattr(sae, name)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        sae.center.copy_(torch.randn(d_in, generator=generator))
        sae.scale.fill_(0.7)
    return sae.to(DEVICE)


def batch(n_rows: int, d_in: int, seed: int):
    return 2 * torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run_of(sae: Any, n_rows: int, n_steps: int, n_dead: int = 0, left: int = 0) -> Trained:
    """A run whose first features are dead, or would be after so many tokens."""
    train = TrainConfig(n_tokens=n_rows * n_steps, batch_size=n_rows, log_every=1, device=DEVICE.type)
    adam, dead = Adam(sae.parameters(), sae.weight_decay), DeadFeatures(sae.d_sae, _WINDOW, DEVICE)
    dead.tokens_since_fired[:n_dead] = _WINDOW - left
    return Trained(sae, adam, dead, HOOKS, train, Mesh(), None, DEVICE, RULES)


def fused_training(of: Trained) -> FusedTraining:
    with using("triton"):
        step = make_step(of)
    assert isinstance(step, FusedTraining)
    return step


def one_step(training: Any, x, step: int, lr: float, backend: str) -> dict[str, Any]:
    """The metrics of a step, waited for."""
    with using(backend):
        found = training({"hook": x}, step, lr, True) + training.settle(step + 1)
    assert [n for n, _ in found] == [step]
    return found[0][1]


def general_acts(of: Trained, x, step: int):
    """What the general step selects, from a copy of the SAE: a loss may move averages and controllers."""
    with using("torch"):
        return copy.deepcopy(of.sae).loss(Batch(x, x), StepInfo(of.dead.dead, step, of.train.n_steps)).feature_acts


def compare(
    config: Any,
    n_rows=6,
    d_in=12,
    n_steps=1,
    change=None,
    data=batch,
    n_dead=0,
    lr=1e-2,
    rtol=1e-4,
    run=40,
    exact=True,
):
    """Both steps on the same batches, and unless pairs tie that of float64; returns the fused one."""
    saes = [an_sae(config, d_in) for _ in range(2)]
    for sae in saes:
        if change is not None:
            change(sae)
    ours, theirs, reference = (run_of(sae, n_rows, run, n_dead) for sae in (*saes, copy.deepcopy(saes[1]).double()))
    fused, general, dense = fused_training(ours), AutogradTraining(theirs), AutogradTraining(reference)
    for step in range(n_steps):
        x = data(n_rows, d_in, step)
        want_acts = general_acts(theirs, x, step).to_dense()
        got = one_step(fused, x, step, lr, "triton")
        want = one_step(general, x, step, lr, "torch")
        one_step(dense, x.double(), step, lr, "reference")
        acts = fused.fused.feature_acts().to_dense()
        assert torch.equal(acts != 0, want_acts != 0), "other pairs are kept"
        torch.testing.assert_close(acts, want_acts, rtol=rtol, atol=rtol / 10)
        assert set(got) == set(want)
        assert got == pytest.approx(want, rel=10 * rtol, abs=1e-6)
        assert torch.equal(ours.dead.tokens_since_fired, theirs.dead.tokens_since_fired)
    for other in (theirs, reference) if exact else (theirs,):
        for (name, mine), its in zip(saes[0].state_dict().items(), other.sae.state_dict().values(), strict=True):
            torch.testing.assert_close(
                mine.double(), its.double(), rtol=rtol, atol=0.3 * rtol, msg=lambda text, name=name: f"{name}: {text}"
            )
    return fused


def silence(sae: Any, n: int) -> None:
    """Let the first n features never fire."""
    with torch.no_grad():
        sae.b_enc[:n] = 0.0 if getattr(sae, "signed", False) else -50.0
        sae.W_enc[:n] *= 1e-3


def steady_steps(config: Any, batches, n_dead: int = 0):
    """What steps on these batches ask for, in the middle of a run."""
    n_rows, d_in = batches[0].shape
    sae = an_sae(config, d_in)
    silence(sae, n_dead)
    training, asked = fused_training(run_of(sae, n_rows, 40, n_dead)), []
    with using("triton"):
        training({"hook": batch(n_rows, d_in, 0)}, 0, 1e-2, True)
        for step, x in enumerate(batches, start=1):
            with counted() as counts:
                found = training({"hook": x}, step, 1e-2, True)
            assert [n for n, _ in found] == [step - 1], "the step has waited for its own metrics"
            asked.append(counts)
    return asked


def state_after(config: Any, batches, settle_at: int | None = None, dying: int = 0):
    """Weights, buffers, moments and counters after steps on these batches, settled once in between if so asked; the first
    features never fire, and are dead after three steps."""
    n_rows, d_in = batches[0].shape
    sae = an_sae(config, d_in)
    silence(sae, dying)
    of = run_of(sae, n_rows, 40, dying, left=3 * n_rows)
    training, found = fused_training(of), []
    with using("triton"):
        for step, x in enumerate(batches):
            if step == settle_at:
                found += training.settle(step)
                training = fused_training(of)  # as a resumed run does
            found += training({"hook": x}, step, 1e-2, True)
        found += training.settle(len(batches))
    metrics = {f"step {step}": torch.tensor(list(values.values())) for step, values in found}
    return {**of.sae.state_dict(), **of.adam.state_dict(), "since": of.dead.tokens_since_fired, **metrics}


def nan_step(config: Any, n_rows=6, d_in=12) -> None:
    """A batch with NaN changes no weight, and is reported."""
    of = run_of(an_sae(config, d_in), n_rows, 40)
    before = [p.detach().clone() for p in of.sae.parameters()]
    x = batch(n_rows, d_in, 0)
    x[3, 5] = float("nan")
    found = one_step(fused_training(of), x, 0, 1e-2, "triton")
    assert all(torch.equal(p, q) for p, q in zip(of.sae.parameters(), before, strict=True))
    assert not torch.isfinite(torch.tensor(found["grad_norm"]))


def finish_in_torch(monkeypatch: Any) -> None:
    """What follows the last step, calibration and golden outputs, is no fused step: PyTorch does it sooner."""
    monkeypatch.setattr(Run, "finish", using("torch")(Run.finish))


def replaced(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, **changes)


# What may be done to an SAE or to the kernels before they are compared.


def mostly_negative(sae):
    sae.b_enc.data.fill_(-3.0)


def all_negative(sae):
    sae.b_enc.data.fill_(-100.0)


def on_every_token(sae):
    sae.b_enc.data[3], sae.b_enc.data[7] = 50.0, 60.0


def in_parts(monkeypatch):
    parts = fused_step.slices_of
    monkeypatch.setattr(fused_step, "slices_of", lambda rows, d_sae: parts(rows, d_sae, limit=50))


def by_feature(monkeypatch):
    monkeypatch.setattr(products, "CACHE_BYTES", 0)


def equal_features(sae):
    sae.W_enc.data[10:16], sae.b_enc.data[10:16] = sae.W_enc.data[0].clone(), sae.b_enc.data[0].clone()
