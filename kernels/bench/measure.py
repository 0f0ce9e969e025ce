"""Time one size for `bench_step`: our step in turn with each baseline, our ops in turn with the dense ones; rows of the CSV."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from saelab.kernels.bench import peers
from saelab.kernels.bench.gpu_trace import allocated, trace
from saelab.kernels.bench.providers import Baseline, Model, Op, op_pair
from saelab.kernels.bench.rows import hardware, least, quantiles, ratio
from saelab.kernels.bench.sizes import Shape
from saelab.kernels.bench.sparse_step import SparseTopK
from saelab.kernels.bench.step_data import batches
from saelab.kernels.bench.step_settings import Settings
from saelab.kernels.bench.traffic.step_model import sparse_step
from saelab.kernels.reference.encode_topk import encode_topk
from saelab.kernels.selection_log import SelectionLog, log_selections
from saelab.saes import TopKSAE

BASELINE_WARMUP = 3
"""Most warm-up steps of a baseline: the time of a dense step depends on the sizes alone."""


@dataclass
class Timed:
    """Seconds of the timed calls of a provider, and of our calls between them."""

    provider: str
    dtype: str
    times: list[float]
    ours: list[float]
    trace: Mapping[str, float]
    work: Model | None = None
    precision: str = "bf16"


def measure(settings: Settings, shape: Shape, others: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The rows of one size; `others` are the commands of the peers. Raises `AssertionError` for a wrong selection."""
    stream = batches(shape.batch, shape.d_in, settings.device, settings.cache)
    first = next(stream)
    shape = shape._replace(d_in=first.shape[1])
    held = allocated(settings.device)
    ours = SparseTopK(shape.d_in, shape.d_sae, shape.k, settings.device)
    for x in islice(stream, settings.warmup_steps):
        ours.step(x)
    _check_selection(ours.sae, first, shape.k)
    size = _Size(settings, shape, stream, first, ours)
    rows = size.step_rows(others if settings.with_dense(shape.d_sae) else {}, held) if "step" in settings.ops else []
    for op in settings.ops:
        rows += size.op_rows(op) if op != "step" else []
    return rows


class _Size:
    """One size: our model after its warm-up, and batches."""

    def __init__(self, settings: Settings, shape: Shape, stream: Iterator[Tensor], first: Tensor, ours: SparseTopK):
        self.settings, self.shape, self.stream, self.first, self.ours = settings, shape, stream, first, ours
        self.our_times: list[float] = []

    def step_rows(self, others: dict[str, list[str]], held: int) -> list[dict[str, Any]]:
        """Rows of the step: one for each baseline and peer that ran, then ours. `held` bytes were allocated before our model."""
        traced = trace(lambda: self.ours.step(self.first), self.settings.device, held)
        with log_selections() as log:
            baselines = self.settings.baselines_at(self.shape.d_sae)
            found = [timed for baseline in baselines if (timed := self._beside(baseline)) is not None]
            from_peers = self._beside_peers(others) if others else []
            if not self.our_times:
                self._our_steps()
        rows = [self._row("topk_step", timed) | ratio(timed.times, timed.ours) for timed in found + from_peers]
        screen = self.settings.screen
        ours = Timed("saelab", self._dtype, self.our_times, [], traced, sparse_step, screen)
        rows.append(self._row("topk_step", ours) | (self.ours.selection() or _selection(log, self.shape.k)))
        if found:
            fastest = min(found, key=lambda timed: quantiles(timed.times)["median"])
            rows[-1] |= ratio(fastest.times, fastest.ours)
        return rows

    def op_rows(self, op: Op) -> list[dict[str, Any]]:
        """Rows of an op without gradients: the dense one, then ours."""
        device, x = self.settings.device, self.first
        with torch.no_grad():
            pair = op_pair(op, self.ours.sae, x)
            for batch in islice(self.stream, BASELINE_WARMUP):
                pair.ours(batch)
                pair.dense(batch)
            each = [(_timed(pair.ours, x), _timed(pair.dense, x)) for x in islice(self.stream, self.settings.pairs)]
            ours, dense = (list(times) for times in zip(*each, strict=True))
            traced = [trace(lambda call=call: call(x), device, allocated(device)) for call in (pair.ours, pair.dense)]
        rows = [
            Timed("dense bf16", "bfloat16", dense, ours, traced[1], pair.dense_work),
            Timed("saelab", self._dtype, ours, [], traced[0], pair.our_work, self.settings.screen),
        ]
        return [self._row(pair.op, timed) | ratio(dense, ours) for timed in rows]

    @property
    def _dtype(self) -> str:
        return "float32 (bf16 screen)" if self.settings.screen == "bf16" else "float32"

    def _our_steps(self) -> list[float]:
        return [self._our_step(x) for x in islice(self.stream, self.settings.pairs)]

    def _our_step(self, x: Tensor) -> float:
        self.our_times.append(_timed(self.ours.step, x))
        return self.our_times[-1]

    def _beside(self, baseline: Baseline) -> Timed | None:
        """Our steps in turn with those of a baseline, which is then freed; None, and a line on stderr, if it cannot run."""
        settings, held = self.settings, allocated(self.settings.device)
        try:
            model = baseline.build(self.shape, settings.device)
            for x in islice(self.stream, max(1, min(BASELINE_WARMUP, settings.warmup_steps))):
                model.step(x)
            each = [(self._our_step(x), _timed(model.step, x)) for x in islice(self.stream, settings.pairs)]
            traced = trace(lambda: model.step(self.first), settings.device, held)
        except baseline.skipped as error:
            reason = (str(error).splitlines() or [""])[0]
            print(
                f"{baseline.provider} skipped at {self.shape.label}: {type(error).__name__}: {reason}", file=sys.stderr
            )
            return None
        finally:
            torch.compiler.reset()  # compiled code refers to the model
        ours, theirs = (list(times) for times in zip(*each, strict=True))
        provider = f"{baseline.provider} {getattr(model, 'version', '')}".strip()
        return Timed(provider, baseline.dtype, theirs, ours, traced, baseline.work, baseline.precision)

    def _beside_peers(self, others: dict[str, list[str]]) -> list[Timed]:
        """Our steps in turn with those of all peers, after the same warm-up."""
        with peers.Peers(others, self.first, self.shape.d_sae, self.shape.k) as beside:
            beside.step(self.first)
            for x in islice(self.stream, self.settings.warmup_steps):
                beside.step(x)
            beside.check_learning(self.first)
            ours: list[float] = []
            for x in islice(self.stream, self.settings.pairs):
                ours.append(self._our_step(x))
                beside.step(x, timed=True)
            return [Timed(name, "float32", times, ours, {}) for name, times in beside.seconds().items()]

    def _row(self, op: str, timed: Timed) -> dict[str, Any]:
        spread = quantiles(timed.times)
        work = timed.work(*self.shape) if timed.work is not None else None
        row = {"op": op, "shape": self.shape.label, "dtype": timed.dtype, "provider": timed.provider}
        modelled = least(work, timed.precision, self.settings.device, spread["median"])
        return row | spread | dict(timed.trace) | modelled | {"hardware": hardware()}


def _selection(log: SelectionLog, k: int) -> dict[str, float]:
    rows = max(log.rows, 1)
    return {
        "margin": round(log.candidates / rows - k, 1),
        "certified": round(log.certified / rows, 6),
        "recomputed": round(log.recomputed / rows, 6),
    }


def _check_selection(sae: TopKSAE, x: Tensor, k: int) -> None:
    """Compare the selection of 64 rows with float64; raise `AssertionError` on a difference beyond rounding."""
    with torch.no_grad():
        feature_acts = sae.encode(x)
        centered = (sae.normalize(x[:64]) - sae.b_dec).double()
        want = encode_topk(centered, sae.W_enc.double(), sae.b_enc.double(), k)
        got = feature_acts.select_rows(torch.arange(64, device=x.device)).to_dense()
    assert torch.allclose(got.double(), want, atol=1e-4), (
        "encode_topk differs from float64 on this machine; nothing is timed"
    )


def _timed(step: Callable[[Tensor], Any], x: Tensor) -> float:
    """Seconds of one step, including the GPU's work."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
