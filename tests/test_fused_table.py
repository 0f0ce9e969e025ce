"""What each fused step asks of a GPU: few launches, the same whatever the data, and no wait, also if features are dead."""

import pytest
import torch
from fused_cases import DEVICE, batch, steady_steps

from saelab.kernels.triton_backend.step import bucket
from saelab.saes import AbsTopKConfig, BatchTopKConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from saelab.training import fused_step, steps

TOPK, BATCH, JUMP = (
    TopKConfig(d_sae=10, k=3, k_aux=2),
    BatchTopKConfig(d_sae=10, k=3, k_aux=2),
    JumpReLUConfig(d_sae=10),
)
TABLE = {
    "topk": (TOPK, 40),
    "topk, dense": (TOPK, 40),
    "decoder_norm": (TopKConfig(d_sae=10, k=3, k_aux=2, score="decoder_norm"), 40),
    "abs_topk": (AbsTopKConfig(d_sae=10, k=3, k_aux=2), 40),
    "batch_topk": (BATCH, 60),
    "relu": (ReLUConfig(d_sae=10), 60),
    "jumprelu": (JumpReLUConfig(d_sae=10, target_l0=3.0), 60),
    "tanh": (JumpReLUConfig(d_sae=10, loss="tanh", sparsity_coefficient=2.0), 60),
    "jumprelu, auxk": (JumpReLUConfig(d_sae=10, revive="auxk"), 60),
}
"""At most so many launches."""
HELP = {"_add_gradients_kernel", "_add_sums_kernel"}
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy runs the kernels, also on memory never written


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counted in the interpreter")
@pytest.mark.parametrize("n_dead", [0, 4])
@pytest.mark.parametrize("name", TABLE)
def test_it_launches_little_whatever_the_data_and_never_waits(monkeypatch, name, n_dead):
    monkeypatch.setattr(fused_step, "dense_pays", lambda d_sae, k: name == "topk, dense")
    monkeypatch.setattr(fused_step, "HORIZON", 2)
    monkeypatch.setattr(steps, "LAG", 1)
    monkeypatch.setattr(bucket, "_LEAST", 4)
    config, most = TABLE[name]
    usual, other = steady_steps(config, [batch(6, 12, 99), torch.zeros(6, 12, device=DEVICE)], n_dead)
    print(f"{name}, {n_dead} dead: {len(usual.calls)}")
    assert usual.waits == []
    assert 20 < len(usual.calls) <= most, usual.calls
    assert other.calls == usual.calls
    helped = any(call[0] in HELP for call in usual.calls)
    assert helped == bool(n_dead and name not in ("relu", "jumprelu"))
