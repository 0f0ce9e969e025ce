"""The language of finite-state machines, and the benchmark on it at toy size."""

from typing import Any

import pytest
import torch

from saelab.benchmarks.fsm import FSMResult, allowed_share, purity, run_fsm
from saelab.benchmarks.fsm_language import BOS, D_VOCAB, Machine
from saelab.features.separability import js_divergence
from saelab.saes import CodebookConfig

LINE = Machine(torch.tensor([[1, 2], [2, 0], [0, 11]] + [[0, 1]] * 9))  # 12 states: two digits


def test_machine_by_hand():
    walks = torch.tensor([[0, 2, 11]])
    ids = LINE.write(walks)
    assert ids.tolist() == [[BOS, 0, 0, 0, 2, 1, 1]] and D_VOCAB == 11
    assert LINE.read(torch.tensor([[0, 2], [1, 1], [1, 2], [BOS, 1]])).tolist() == [2, 11, -1, -1]
    assert LINE.allowed[0].nonzero().squeeze(1).tolist() == [1, 2]
    assert LINE.next_digit()[2, :2].tolist() == [0.5, 0.5] and LINE.next_digit()[0, 0] == 1
    after = torch.tensor([1, 3, -1, 11])
    assert allowed_share(LINE, torch.tensor([0, 0, 0, 2]), after) == 0.5


def test_walks_follow_the_edges():
    machine = Machine.random(50, 10, seed=3)
    assert machine.n_digits == 2 and machine.edges.shape == (50, 10)
    assert all(len(set(row)) == 10 for row in machine.edges.tolist())
    walks = machine.walks(200, 9, seed=1)
    assert bool(machine.allowed[walks[:, :-1], walks[:, 1:]].all())
    assert torch.equal(walks, machine.walks(200, 9, seed=1)) and not torch.equal(walks, machine.walks(200, 9, seed=2))
    share = torch.bincount(machine.walks(20_000, 1, seed=0)[:, 0], minlength=50) / 20_000
    assert float((share - 0.02).abs().max()) < 0.005
    with pytest.raises(ValueError, match="n_edges=5"):
        Machine.random(4, 5)


def test_js_divergence_by_hand():
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    torch.testing.assert_close(js_divergence(p, q), torch.tensor([1.0, 0.0, 0.311278]))


def test_purity_by_hand():
    """Code 7 stands for state 0, code 8 for state 1 (2 of 3); code 9 was never seen and stands for none."""
    fit, states = torch.tensor([[7], [7], [8], [8], [8]]), torch.tensor([0, 0, 1, 1, 0])
    codes, test = torch.tensor([[7], [8], [8], [9]]), torch.tensor([0, 0, 1, 1])
    assert purity(fit, states, codes, test) == pytest.approx((0.5 + 0.5) / 2)
    assert purity(fit, states, codes[:3], test[:3]) == pytest.approx((0.5 + 1) / 2)


def test_a_claim_that_fails_is_printed_as_such():
    numbers: dict[str, Any] = dict.fromkeys(
        ("loss", "loss_bare", "accuracy_chance", "purity_chance", "js_own", "accuracy_forced"), 0.5
    )
    numbers |= {"seed": 0, "n_states": 5, "n_steps": 1, "purity_hook": "here", "purities": {"here": 0.9}, "purity": 0.9}
    numbers |= {"accuracy": 0.9, "accuracy_bare": 1.0, "js_before": 0.4, "js_forced": 0.2}
    result = FSMResult(**numbers)
    assert [held for _, held in result.claims] == [False, True, True, True]
    assert "NOT held  accuracy 0.900 >= 0.95 * 1.000" in str(result) and "held      state purity 0.900" in str(result)


def tiny_run(n_steps: int) -> FSMResult:
    """Five states, two edges: one digit a state."""
    size: dict[str, Any] = {"batch_size": 32, "walk_length": 10, "d_model": 32, "n_layers": 1, "n_heads": 2}
    return run_fsm(0, 5, 2, n_steps=n_steps, **size, config=CodebookConfig(40, 1), lr=5e-3, progress=False)


def test_a_tiny_machine_is_learned():
    """Codes stand for states, and forcing them leads to another state's successors."""
    result = tiny_run(100)
    assert result.accuracy > 0.85 and result.accuracy_bare > 0.9 and result.accuracy_chance == 0.2
    assert result.purity > 0.9 > 0.5 > result.purity_chance
    assert result.js_forced < 0.5 * result.js_before and result.accuracy_forced > 0.7


def test_a_seed_decides_the_result():
    assert tiny_run(5) == tiny_run(5)
    with pytest.raises(ValueError, match="k=2"):
        run_fsm(config=CodebookConfig(40, 2))
