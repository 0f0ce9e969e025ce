"""What `bench_step` compares our step and our ops with: `BASELINES` for the step, `op_pair` for encode and decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import linear

from saelab.kernels.bench import peer_worker
from saelab.kernels.bench.dense_step import DenseEncoder, DenseTopK, Precision, matmul_precision
from saelab.kernels.bench.sizes import Shape
from saelab.kernels.bench.traffic import step_model
from saelab.kernels.bench.traffic.step_model import Work
from saelab.kernels.decode import decode
from saelab.kernels.encode_topk import encode_topk
from saelab.saes import TopKSAE

BaselineName = Literal["fp32", "tf32", "bf16", "compiled", "encoder", "sparsify"]
Op = Literal["step", "encode", "decode"]
Model = Callable[[int, int, int, int], Work]


@runtime_checkable
class Step(Protocol):
    """A model with its optimiser."""

    def step(self, x: Tensor) -> Any: ...


@dataclass(frozen=True)
class Baseline:
    """A training step to compare ours with."""

    provider: str
    dtype: str
    """The column: dtype of weights and sums; in parentheses that of the products, if different."""
    build: Callable[[Shape, str], Step]
    work: Model | None = None
    precision: str = "bf16"
    """Of the products, for the model of the least time."""
    skipped: type[Exception] = torch.OutOfMemoryError
    """An error of this class leaves the baseline out at that size; any other is raised."""


class Sparsify:
    """eai-sparsify in this process, on the device; `fit` allows TF32."""

    def __init__(self, shape: Shape, device: str) -> None:
        with matmul_precision("high"):
            self._peer = peer_worker.Sparsify(shape.d_in, shape.d_sae, shape.k, shape.batch, device)
            self.version = self._peer.version

    def step(self, x: Tensor) -> float:
        with matmul_precision("high"):
            return self._peer.step(x)


def _dense(precision: Precision) -> Callable[[Shape, str], Step]:
    return lambda shape, device: DenseTopK(shape.d_in, shape.d_sae, shape.k, device, precision)


def _dense_encoder(shape: Shape, device: str) -> Step:
    return DenseEncoder(shape.d_in, shape.d_sae, shape.k, device, "bf16")


_BF16 = "float32 (bf16 products)"

BASELINES: dict[BaselineName, Baseline] = {
    "fp32": Baseline("dense", "float32", _dense("fp32"), step_model.dense_step, "fp32"),
    "tf32": Baseline("dense tf32", "float32 (tf32 products)", _dense("tf32"), step_model.dense_step, "tf32"),
    "bf16": Baseline("dense bf16", _BF16, _dense("bf16"), step_model.dense_step),
    "compiled": Baseline("dense compiled", _BF16, _dense("compiled"), step_model.dense_step, skipped=Exception),
    "encoder": Baseline("dense encoder", _BF16, _dense_encoder, step_model.encoder_step),
    "sparsify": Baseline("eai-sparsify", _BF16, Sparsify, skipped=Exception),
}
"""By the word of `--baselines`. What a compiler or another library raises is a reason to skip it, not to stop."""


@dataclass(frozen=True)
class OpPair:
    """Our op and its dense counterpart at one size."""

    op: str
    ours: Callable[[Tensor], Any]
    dense: Callable[[Tensor], Any]
    our_work: Model
    dense_work: Model


def op_pair(op: Op, sae: TopKSAE, x: Tensor) -> OpPair:
    """`encode_topk` of a batch, or `decode` of the feature activations of `x`, without gradients.

    Ours starts from fp32 weights. The dense product starts from bf16 weights and, in decode, from dense bf16 activations.
    """
    low = {name: p.detach().bfloat16() for name, p in sae.named_parameters()}
    W_enc, b_enc, W_dec, b_dec, k = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.config.k
    if op == "encode":
        return OpPair(
            "encode_topk",
            lambda x: encode_topk(x, W_enc, b_enc, k, center=b_dec),
            lambda x: linear((x - b_dec).bfloat16(), low["W_enc"], low["b_enc"]).topk(k, dim=1),
            step_model.sparse_encode,
            step_model.dense_encode,
        )
    feature_acts = encode_topk(x, W_enc, b_enc, k, center=b_dec)
    dense = feature_acts.to_dense().bfloat16()
    return OpPair(
        "decode",
        lambda _: decode(feature_acts, W_dec, b_dec),
        lambda _: torch.addmm(low["b_dec"], dense, low["W_dec"]),
        step_model.sparse_decode,
        step_model.dense_decode,
    )
