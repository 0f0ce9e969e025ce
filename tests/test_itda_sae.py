"""ITDA: its dictionary against one built row by row, labels, tau, duplicates, a full dictionary, both solvers, and training."""

import copy
from typing import Any

import pytest
import torch
from tiny_runs import make_run
from tiny_saes import D_SAE, build, info, interrupt_before, rows

from saelab import TrainConfig, load_sae, train
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.row_labels import row_labels
from saelab.saes import ITDASAE, Batch, ITDAConfig, MatchingPursuitConfig, MatchingPursuitSAE
from saelab.saes.atoms import extended, numbered
from saelab.saes.omp import orthogonal_pursuit


def built(x: torch.Tensor, batch: int = 64, **settings: Any) -> ITDASAE:
    """A dictionary of the rows `x`, read `batch` at a time."""
    sae = ITDASAE(ITDAConfig(**({"d_sae": 30, "k": 3, "normalize": "none"} | settings)), x.shape[1]).to(x.dtype)
    for part in x.split(batch):
        sae.loss(Batch(part, part), info())
    return sae


def labels(sae: ITDASAE) -> list[int]:
    """The numbers of the rows that are atoms."""
    assert (sae.labels[: int(sae.n_atoms), 0] == -1).all()
    return sae.labels[: int(sae.n_atoms), 1].tolist()


def one_by_one(x: torch.Tensor, tau: float, k: int, relative: bool = True) -> tuple[list[int], list[torch.Tensor]]:
    """Rows and atoms, by a dense pursuit of each row against the atoms so far."""
    numbers, atoms = [], []
    for i, row in enumerate(x):
        rest = row.clone()
        for _ in range(k if atoms else 0):
            best = max(atoms, key=lambda atom: abs(float(atom @ rest)))
            rest = rest - (best @ rest) * best
        error = float(rest @ rest) / (float(row @ row) if relative else 1)
        if error > tau:
            numbers.append(i)
            atoms.append(row / row.norm())
    return numbers, atoms


@pytest.mark.parametrize(("error", "tau"), [("relative", 0.15), ("absolute", 25.0)])
def test_the_dictionary_is_that_built_row_by_row(error, tau):
    x = rows(120).double()
    numbers, atoms = one_by_one(x, tau, 3, error == "relative")
    sae = built(x, d_sae=120, tau=tau, error=error)
    assert labels(sae) == numbers and 10 < len(numbers) < 110
    torch.testing.assert_close(sae.W_dec[: len(atoms)], torch.stack(atoms))
    assert not sae.W_dec[len(atoms) :].any() and (sae.labels[len(atoms) :] == -1).all()


def test_it_depends_on_the_order_of_rows_and_not_on_the_batches():
    x = rows(100)
    sae = built(x)
    for batch in (7, 100):
        other = built(x, batch)
        assert other.hash == sae.hash
    assert labels(built(x.flip(0))) != labels(sae) and int(sae.n_rows) == 100


def test_rotated_activations_give_the_same_labels():
    x = rows(80).double()
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    one, other = built(x, tau=0.1), built(x @ rotation, tau=0.1)
    assert labels(one) == labels(other) and one.fingerprint == other.fingerprint
    assert not torch.allclose(one.W_dec, other.W_dec)


def test_an_atom_is_rebuilt_by_itself():
    x = rows(150)
    sae = built(x, tau=0.1)
    own = x[labels(sae)]
    acts = sae.encode_in_steps(own, 1)
    assert acts.features.tolist() == list(range(len(own)))
    torch.testing.assert_close(sae.decode(acts), own)
    torch.testing.assert_close(acts.values, own.norm(dim=1))


def test_a_higher_tau_gives_no_larger_dictionary():
    x = rows(80)
    sizes = [int(built(x, d_sae=80, tau=tau).n_atoms) for tau in (0.0, 0.1, 0.2, 0.4, 0.8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 80 and len(set(sizes)) == 5 and sizes[-1] >= 1


def test_duplicates_and_opposites_are_not_added():
    x = rows(10)
    sae = built(torch.cat([x, 2 * x, -x, x + 1e-4, torch.zeros(2, 12)]), tau=0.0)
    assert labels(sae) == list(range(10))


def test_a_full_dictionary_stays_as_it_is():
    x = rows(80)
    small, large = built(x, d_sae=12, tau=0.01), built(x, d_sae=20, tau=0.01)
    assert labels(small) == labels(large)[:12] and int(small.n_atoms) == 12
    torch.testing.assert_close(small.W_dec, large.W_dec[:12])
    before = small.W_dec.clone()
    loss = small.loss(Batch(x, x), info())
    assert torch.equal(small.W_dec, before) and float(loss.terms["above_tau"]) > 0.5


def test_unused_rows_never_fire():
    sae = built(rows(100), tau=0.7)
    assert 0 < int(sae.n_atoms) < 30
    assert int(sae.encode(rows(500, 9)).features.max()) < int(sae.n_atoms)


def test_e20_encoding_is_the_signed_matching_pursuit():
    """Identity E20, exactly."""
    sae = built(rows(150))
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(30, 3, signed=True, normalize="none"), 12)
    with torch.no_grad():
        pursuit.W_dec.copy_(sae.W_dec)
    x = rows(80, 4)
    assert torch.equal(sae.encode(x).to_dense(), pursuit.encode(x).to_dense())
    assert torch.equal(sae(x).x_hat, pursuit(x).x_hat) and (sae.encode(x).values < 0).any()


def test_omp_is_least_squares_on_what_it_chose():
    x, W = rows(40).double(), torch.nn.functional.normalize(rows(30, 3).double(), dim=1)
    acts = orthogonal_pursuit(x, W, 4)
    z = acts.to_dense()
    for t, row in enumerate(x):
        rest, chosen = row, []
        for _ in range(4):
            chosen.append(int((W @ rest).abs().argmax()))
            fit = torch.linalg.lstsq(W[chosen].T, row[:, None]).solution[:, 0]
            rest = row - fit @ W[chosen]
        assert (z[t] != 0).nonzero().flatten().tolist() == sorted(chosen)
        torch.testing.assert_close(z[t, chosen], fit)
    assert torch.equal(orthogonal_pursuit(x[7:8], W, 4).to_dense(), z[7:8])
    whole = orthogonal_pursuit(x, W, 20)  # after 12 steps nothing is left to span
    assert whole.counts.max() == 12
    torch.testing.assert_close(whole.to_dense() @ W, x)
    assert orthogonal_pursuit(x[:3], torch.zeros(5, 12, dtype=torch.float64), 3).nnz == 0


def test_e19_orthogonal_pursuit_leaves_no_more_on_the_same_support():
    """Identity E19: where both chose the same atoms."""
    x = rows(120)
    mp, omp = built(x, tau=0.05), built(x, tau=0.05, solver="omp")
    with torch.no_grad():
        omp.W_dec.copy_(mp.W_dec)
    one, other = mp(x), omp(x)
    same = ((one.acts.to_dense() != 0) == (other.acts.to_dense() != 0)).all(1)
    errors = [(x - output.x_hat).square().sum(1)[same] for output in (one, other)]
    assert same.sum() > 15 and (errors[1] <= errors[0] * (1 + 1e-5) + 1e-6).all()


def test_a_fingerprint_is_that_of_the_stream_whatever_its_parts():
    stream, start = numbered(5, 40), torch.zeros((), dtype=torch.int64)
    whole = extended(start, stream)
    parts = start
    for part in stream.split(7):
        parts = extended(parts, part)
    assert parts == whole == extended(start, stream.clone()) and extended(start, stream[:0]) == start
    changed = stream.clone()
    changed[3, 0] += 1
    assert (
        len({int(extended(start, one)) for one in (stream, stream.flip(0), stream[1:], changed, stream.flip(1))}) == 5
    )


SHORT = TrainConfig(n_tokens=64 * 8, batch_size=64, checkpoint_every=3, grad_accumulation=2, device="cpu")


def test_training_labels_atoms_with_the_rows_of_a_tensor(tmp_path):
    x = rows(900)
    sae: Any = train(ITDAConfig(40, 3, tau=0.1), x, SHORT, tmp_path / "sae", progress=False)
    own = x[labels(sae)]
    torch.testing.assert_close(sae.W_dec[: int(sae.n_atoms)], own / own.norm(dim=1, keepdim=True))
    again: Any = load_sae(tmp_path / "sae")
    assert again.hash == sae.hash and labels(again) == labels(sae) and int(again.n_rows) == 512


def test_a_run_that_was_interrupted_ends_with_the_same_dictionary(tmp_path, monkeypatch):
    x, config = rows(900), ITDAConfig(40, 3, tau=0.1)
    sae = train(config, x, SHORT, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        interrupt_before(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config, x, SHORT, tmp_path / "cut", progress=False)
    assert train(config, x, SHORT, tmp_path / "cut", progress=False).hash == sae.hash


def test_atoms_are_labelled_with_document_and_place_in_a_cache(tmp_path, tiny_lm):
    cache = ActivationCache(make_run(tmp_path / "run", tiny_lm) / "cache")
    where: dict[bytes, set[tuple[int, int]]] = {}  # a row may occur twice
    document = cache.tokens()[1]
    for x, index in cache.shards():
        for row, seq, pos in zip(x, index["seq"].tolist(), index["pos"].tolist(), strict=True):
            number = int(document[seq, pos])
            place = seq * document.shape[1] + pos - int((document.flatten() == number).nonzero()[0])
            here = where.setdefault(row.float().numpy().tobytes(), set())
            here.add((int(cache.document_ids[number]), place))
    hook = cache.hook_names[0]
    batches = cache.batches(50, seed=3, start_step=2, hook_name=hook, leave_out=10)
    for _, x, found in zip(range(2 * cache.n_rows // 50), batches, row_labels(cache, 10, 50, 3, 2), strict=False):
        for row, label in zip(x, found.tolist(), strict=True):
            assert tuple(label) in where[row.numpy().tobytes()]
    sae: Any = train(ITDAConfig(30, 3, normalize="none"), cache, SHORT, hook_name=hook, progress=False)
    atoms = {tuple(label): atom for label, atom in zip(sae.labels.tolist(), sae.W_dec, strict=True)}
    assert int(sae.n_atoms) == 30 and set(atoms) <= set().union(*where.values())


def test_nothing_of_it_has_a_gradient():
    sae, before = build("itda"), torch.zeros(0)
    assert not any(one.requires_grad for one in sae.parameters()) and 20 < int(sae.n_atoms) < D_SAE
    before = copy.deepcopy(sae.state_dict())
    sae.after_step()
    assert all(torch.equal(one, before[name]) for name, one in sae.state_dict().items())


@pytest.mark.parametrize(("changes", "says"), [({"tau": -0.1}, "tau=-0.1"), ({"k": 0}, "k=0")])
def test_bad_settings_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        ITDAConfig(16, **changes)


def test_a_run_shows_its_rows_and_advises_what_helps_a_dictionary_built_in_one_pass(monkeypatch, capsys, caplog):
    monkeypatch.setattr("saelab.saes.itda._PATIENCE", 0.0)
    config, training = ITDAConfig(64, k=8, tau=0.9), TrainConfig(n_tokens=128, batch_size=64, device="cpu")
    with caplog.at_level("WARNING", "saelab"):
        train(config, rows(400), training)
    assert "Rows of this step" in capsys.readouterr().err
    (said,) = [record.message for record in caplog.records if "features fire per token" in record.message]
    assert "Lower tau" in said and "Train longer" not in said
    train(config, rows(400), training, progress=False)
    assert not capsys.readouterr().err
