"""Which code runs, and that the Triton path gives what the PyTorch path gives, through every public op."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_saes import D_SAE, build, info, rows
from torch.utils._python_dispatch import TorchDispatchMode

from saelab.kernels import candidates, dispatch
from saelab.kernels.decode import Decode, DecodeError, decode
from saelab.kernels.encode_batch_topk import encode_batch_topk
from saelab.kernels.encode_feature_topk import encode_feature_topk
from saelab.kernels.encode_groupmax import encode_groupmax
from saelab.kernels.encode_threshold import encode_threshold
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.jump_relu import JumpReLU, jump_relu
from saelab.kernels.primitives import project_, unit_norm_
from saelab.kernels.reference.encode_topk import encode_topk as reference
from saelab.kernels.selected_pre_acts import SelectedPreActs
from saelab.kernels.workspace import WORKSPACE
from saelab.saes import VARIANTS, Batch, StepInfo, TopKConfig, TopKSAE


def make(batch=9, d_in=12, d_sae=67, device="cpu"):
    generator = torch.Generator().manual_seed(batch + d_sae)
    return [torch.randn(*shape, generator=generator).to(device) for shape in ((batch, d_in), (d_sae, d_in), (d_sae,))]


OPS = {
    "topk": lambda x, W, b: encode_topk(x, W, b, 5),
    "topk_centered": lambda x, W, b: encode_topk(x, W, b, 5, center=b[: x.shape[1]]),
    "topk_magnitude": lambda x, W, b: encode_topk(x, W, b, 5, "magnitude"),
    "topk_decoder_norm": lambda x, W, b: encode_topk(x, W, b, 5, "decoder_norm", W.detach().norm(dim=1)),
    "batch_topk": lambda x, W, b: encode_batch_topk(x, W, b, 5 * len(x)),
    "threshold": lambda x, W, b: encode_threshold(x, W, b, 2.0, 0.3),
    "jump_relu": lambda x, W, b: jump_relu(encode_threshold(x, W, b, b.abs().detach(), 0.3), b.abs(), 0.6)[0],
    "feature_topk": lambda x, W, b: encode_feature_topk(
        x, W, b, torch.arange(W.shape[0], device=x.device) % (len(x) + 1)
    ),
}


SHAPES = {"bf16": [(5, 12, 40), (3, 4, 7)], "working": [(3, 17, 67), (3, 4, 7)]}


@pytest.fixture
def screen_dtype(request, monkeypatch):
    monkeypatch.setattr(candidates, "fast_bf16", lambda _: request.param == "bf16")
    monkeypatch.setattr(candidates, "MIN_BF16_ROWS", 0)


def run(name, backend, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    with dispatch.using(backend):
        acts = OPS[name](*leaves)
        x_hat = decode(acts, leaves[1], leaves[0][0])
        x_hat.square().sum().backward()
    return acts, x_hat.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("screen_dtype", "shape"),
    [(dtype, shape) for dtype, shapes in SHAPES.items() for shape in shapes],
    indirect=["screen_dtype"],
    ids=str,
)
def test_every_op_is_the_same_on_every_backend(name, shape, screen_dtype, device):
    inputs = make(*shape, device=device)
    acts, x_hat, grads = run(name, "torch", inputs)
    for backend in ("triton", "reference"):
        other, other_hat, other_grads = run(name, backend, inputs)
        torch.testing.assert_close(other.to_dense(), acts.to_dense(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other_hat, x_hat, rtol=1e-4, atol=1e-4)
        for a, b in zip(other_grads, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any torch op makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_a_whole_triton_step_never_makes_a_dense_code(monkeypatch, device):
    """k * g = 64 < d_sae / 4 = 80: neither forward nor backward holds batch * d_sae elements; the dense step does."""
    monkeypatch.setattr(candidates, "fast_bf16", lambda _: True)
    batch, d_sae = 40, 320
    sae, x = TopKSAE(TopKConfig(d_sae=d_sae, k=2), 8).to(device), make(batch, 8, device=device)[0]
    dead, seen = torch.zeros(d_sae, dtype=torch.bool, device=device), {}
    for name in ("triton", "reference"):
        WORKSPACE.buffers.clear()  # of other tests' sizes
        with dispatch.using(name), LargestTensor() as mode:
            sae.loss(Batch(x, x), StepInfo(dead, 0, 10)).total.backward()
        seen[name] = mode.largest
    assert seen["triton"] < batch * d_sae <= seen["reference"]


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_covers_the_whole_path(name, monkeypatch):
    """Loss, gradients and upkeep of every variant without one op of another backend, and as those give them."""
    found = []
    for backend in ("torch", "reference"):
        sae, x = build(name), rows(40)
        dead = torch.arange(D_SAE) < 5
        with dispatch.using(backend), monkeypatch.context() as patch:
            if backend == "reference":
                for op in (Decode, DecodeError, SelectedPreActs, JumpReLU):
                    patch.setattr(op, "apply", None)
            loss = sae.loss(Batch(x, x), info(dead))
            if loss.total.requires_grad:
                loss.total.backward()
            grads = [p.grad.clone() for p in sae.parameters() if p.requires_grad]
            sae.after_step()
            found.append([loss.total.detach(), sae(x).x_hat.detach(), *grads, *sae.state_dict().values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_primitive_has_a_reference():
    primitives = dispatch._load("reference")
    assert {op.__module__ for op in primitives[1:]} == {"saelab.kernels.reference.primitives"}


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name != "global_pairs"]


@pytest.mark.parametrize(
    "op", [encode_topk, encode_batch_topk, encode_feature_topk, encode_groupmax, encode_threshold, decode, jump_relu]
)
def test_every_op_has_a_reference_of_its_signature(op):
    name = op.__name__
    reference = getattr(importlib.import_module(f"saelab.kernels.reference.{name}"), name)
    assert parameters(reference) == parameters(op)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_backend_has_the_signatures_of_the_primitives(backend):
    """What a backend adds to the shared signature has a default, and only that backend's own files give it."""
    want, have = dispatch._load("reference")._asdict(), dispatch._load(backend)._asdict()
    for name in want.keys() - {"name", "Screen"}:
        plain, own = parameters(want[name]), parameters(have[name])
        assert own[: len(plain)] == plain, name
        assert all(default is not inspect.Parameter.empty for _, default in own[len(plain) :]), name


def test_every_triton_kernel_is_launched_under_the_device_guard():
    """`kernel[grid](...)` runs on the current GPU, so it stands in one function alone, which first takes the tensors'."""
    folder = Path(dispatch.__file__).parent / "triton_backend"
    launches = [
        (path.stem, function.name)
        for path in sorted(folder.glob("*.py"))
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)
    ]
    assert launches == [("launch", "launch")]


def test_rows_and_empty_batches_on_triton(device):
    x, W, b = make(device=device)
    ours, theirs = W.clone(), W.clone()
    with dispatch.using("triton"):
        unit_norm_(ours)
        gradient = torch.ones_like(W)
        project_(gradient, ours)
        assert OPS["topk"](x[:0], W, b).batch == 0 and OPS["threshold"](x[:0], W, b).nnz == 0
        negative = OPS["topk"](-x.abs(), W.abs(), -b.abs())
        assert negative.nnz == 0 and negative.batch == len(x)
    unit_norm_(theirs)
    torch.testing.assert_close(ours, theirs)
    assert float(torch.linalg.vecdot(gradient, ours).abs().max()) < 1e-5


def test_a_training_loss_is_the_same_on_triton(device):
    sae, x = TopKSAE(TopKConfig(d_sae=67, k=4), 12).to(device), make(device=device)[0]
    dead = torch.zeros(67, dtype=torch.bool, device=device)
    dead[:20] = True
    found = []
    for name in ("torch", "triton"):
        with dispatch.using(name):
            loss = sae.loss(Batch(x, x), StepInfo(dead, 0, 10))
            loss.total.backward()
        found.append([loss.total.detach(), *(p.grad for p in sae.parameters())])
        sae.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_float64_goes_through_pytorch_on_triton():
    x, W, b = (t.double() for t in make())
    with dispatch.using("triton"):
        acts = encode_topk(x, W, b, 5)
    torch.testing.assert_close(acts.to_dense(), reference(x, W, b, 5), rtol=1e-12, atol=1e-12)


def test_an_unknown_backend_is_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match="SAELAB_KERNELS='fast' must be one of auto, torch, triton, reference"),
        dispatch.using("fast"),
    ):
        pass


@pytest.mark.parametrize(("choice", "loaded"), [("auto", False), ("torch", False), ("triton", True)])
def test_triton_is_imported_only_where_it_is_chosen(choice, loaded):
    code = (
        "import os, sys, torch\n"
        f"os.environ.update(SAELAB_KERNELS={choice!r}, TRITON_INTERPRET='1')\n"
        "from saelab.kernels.encode_topk import encode_topk\n"
        "encode_topk(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(5), 2)\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(loaded), done.stderr[-500:]
