"""Which dtypes an SAE can have and can read: each variant in each does all its operations, and right, or says why not."""

import copy
import functools

import jaxtyping
import numpy as np
import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, info, rows

from saelab.io import load_sae, save_sae
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import VARIANTS, Batch
from saelab.saes.inputs import DTYPES, HALF

every = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def built(name):
    return build(name)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operation_in_every_dtype(name, dtype, tmp_path):
    """Against the same numbers in float64."""
    sae, x = copy.deepcopy(built(name)).to(dtype), rows(24)
    exact = copy.deepcopy(sae).double()
    assert {p.dtype for p in sae.parameters()} == {dtype}
    output, want = sae(x), exact(x.double())
    torch.testing.assert_close(output.acts.to_dense().double(), want.acts.to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.x_hat.double(), want.x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(output.acts).double(), exact.decode(want.acts), rtol=1e-4, atol=1e-4)
    feature = int(output.acts.features[0])
    column, (direction, scale) = output.acts.column(feature), sae.decoder()
    torch.testing.assert_close(column.double(), want.acts.column(feature), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(direction[feature].double() / scale, exact.decoder()[0][feature] / exact.decoder()[1])
    if dtype in HALF:
        again = load_sae(save_sae(sae, tmp_path / "sae", golden_inputs=x[:8]))
        assert again.hash == sae.hash and {p.dtype for p in again.parameters()} == {dtype}
    _learns_as(exact, sae, x, rtol=2e-2 if dtype in HALF else 1e-3)
    sae.after_step()
    if sae.unit_norm:
        norms = sae.decoder_norms.detach().double()
        assert float((norms[norms > 0] - 1).abs().max()) < (1e-2 if dtype in HALF else 1e-6)


def _learns_as(exact, sae, x, rtol):
    dead = torch.arange(D_SAE) < 4
    for one, batch in ((sae, x), (exact, x.double())):
        total = one.loss(Batch(batch, batch), info(dead)).total
        if total.requires_grad:  # all but those that learn without gradients
            total.backward()
    if not any(p.requires_grad for p in sae.parameters()):
        return
    for (name, p), q in zip(sae.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and p.grad.dtype == p.dtype and q.grad is not None
        assert float((p.grad.double() - q.grad).norm()) <= rtol * float(q.grad.norm()) + 1e-6, name


@every
def test_a_cast_to_half_and_back_keeps_what_decides_what_fires(name):
    sae, cast = built(name), copy.deepcopy(built(name)).bfloat16().half().float()
    for buffer_name, buffer in sae.named_buffers():
        assert torch.equal(cast.get_buffer(buffer_name), buffer), buffer_name


@every
def test_activations_of_any_float_and_layout_are_read(name):
    sae, x = built(name), rows(5)
    given = [x.to(dtype) for dtype in DTYPES] + [x.T.contiguous().T, torch.cat([x, x], 1)[:, :D_IN]]
    given += [x.numpy().astype(kind) for kind in ("f2", "<f4", ">f4", "f8", np.longdouble)]
    given += [np.broadcast_to(x.numpy()[:1], x.shape)]  # not writable, not contiguous
    for one in given:
        wide = torch.tensor(np.asarray(one if isinstance(one, np.ndarray) else one.float()).astype("f4"))
        assert torch.equal(sae.encode(one).to_dense(), sae.encode(wide.contiguous()).to_dense())


@every
def test_what_holds_no_activations_is_refused_by_name(name):
    kinds = (torch.int64, torch.bool, torch.complex64)
    given = [[[0.5] * D_IN] * 3, None, "activations", {"x": rows(3)}, np.zeros((3, D_IN), np.int64), 3]
    for one in given + [torch.zeros(3, D_IN, dtype=kind) for kind in kinds]:
        for call in (built(name), built(name).encode):
            with pytest.raises(ValueError, match=r"tensor or NumPy array of floats \(n_tokens, d_in\), got "):
                call(one)


@every
def test_a_dtype_that_weights_cannot_have_is_refused(name):
    before = built(name).hash
    with pytest.raises(ValueError, match="float16, bfloat16, float32, float64, not float8_e4m3fn"):
        built(name).to(torch.float8_e4m3fn)
    assert built(name).hash == before


@every
def test_what_is_no_code_of_this_sae_is_not_decoded(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    sae, acts = built(name), SparseActs.from_dense(torch.ones(3, D_SAE + 1))
    with pytest.raises(ValueError, match=r"SparseActs that encode returns, got Tensor.*from_dense"):
        sae.decode(acts.to_dense())
    with pytest.raises(ValueError, match=f"d_sae={D_SAE + 1}, but the decoder has d_sae={D_SAE}"):
        sae.decode(acts)
