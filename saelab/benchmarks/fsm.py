"""Codebook benchmark on a finite-state machine: does the model learn it, do codes represent states, and do they steer?

A small transformer is trained from scratch on texts of the machine; a copy of it is trained for the same number
of further steps with codebooks (k = 1) at the heads and the MLP of each layer. Then, on fresh texts:

- first-transition accuracy: fraction of the next states sampled after a random walk that are reachable by an edge;
- purity of a state: fraction of its tokens (last digits) whose code represents it. A code represents the state on which it
  was active most often in other texts. We report the mean over states, at the hook that was best on those other texts;
- steering: all codes of a token are forced to the most common ones of another state. We report the Jensen-Shannon
  divergence between the next-token distribution and the true one of that state, before and after, and the fraction of whole
  next states reachable by an edge from there (later digits are generated with attention to the unchanged earlier digits).
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.benchmarks.fsm_language import D_VOCAB, Machine
from saelab.features.separability import js_divergence
from saelab.models import load_model
from saelab.models.language_model import LanguageModel
from saelab.models.tiny import build_tiny_llama
from saelab.saes.codebook import CodebookConfig, Inserted, finetune, insert

ACCURACY, PURITY, JS_SHARE, FORCED = 0.95, 0.9, 0.5, 0.5
"""Thresholds of the claims: minimum fraction of the bare model's accuracy; minimum purity; maximum fraction of the divergence
without forcing; minimum fraction of the accuracy without forcing."""


@dataclass(frozen=True)
class FSMResult:
    """Results of `run_fsm`; divergences are in bits."""

    seed: int
    n_states: int
    n_steps: int
    loss: float
    """Mean of the last 50 training losses, with codebooks."""
    loss_bare: float
    """The same without codebooks."""
    accuracy: float
    """First-transition accuracy with codebooks."""
    accuracy_bare: float
    """The same without codebooks."""
    accuracy_chance: float
    """Accuracy of uniformly random digits."""
    purity: float
    """Mean over states, at `purity_hook`."""
    purity_hook: str
    purities: dict[str, float]
    """Purity at every hook; at a hook with heads the tuple of their codes counts as one code."""
    purity_chance: float
    """Purity with the states of the tokens shuffled."""
    js_before: float
    """Divergence from the target state's true next-token distribution, with nothing forced."""
    js_forced: float
    """The same with the codes of the target state forced at every hook."""
    js_own: float
    """The same on texts that really end in the target state, with nothing forced: the best that forcing can achieve."""
    accuracy_forced: float
    """Fraction of the next states sampled after forcing that are reachable by an edge from the target state."""

    @property
    def claims(self) -> list[tuple[str, bool]]:
        """Each claim with its numbers, and whether it holds."""
        return [
            (
                f"accuracy {self.accuracy:.3f} >= {ACCURACY} * {self.accuracy_bare:.3f} of the bare model",
                self.accuracy >= ACCURACY * self.accuracy_bare,
            ),
            (f"state purity {self.purity:.3f} >= {PURITY} at {self.purity_hook}", self.purity >= PURITY),
            (
                f"forced divergence {self.js_forced:.3f} <= {JS_SHARE} * {self.js_before:.3f} bits",
                self.js_forced <= JS_SHARE * self.js_before,
            ),
            (
                f"next states after forcing {self.accuracy_forced:.3f} >= {FORCED} * {self.accuracy:.3f}",
                self.accuracy_forced >= FORCED * self.accuracy,
            ),
        ]

    def __str__(self) -> str:
        """A table of the numbers, then the claims."""
        rows = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "purities"]
        rows += [(f"purity at {name}", value) for name, value in self.purities.items()]
        lines = [f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}" for name, value in rows]
        return "\n".join(lines + [f"{'held' if held else 'NOT held':9} {claim}" for claim, held in self.claims])


def run_fsm(
    seed: int = 0,
    n_states: int = 50,
    n_edges: int = 10,
    *,
    n_steps: int = 600,
    batch_size: int = 32,
    walk_length: int = 24,
    d_model: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    config: CodebookConfig | None = None,
    lr: float = 3e-3,
    progress: bool = True,
) -> FSMResult:
    """Train the bare model, then a copy of it with codebooks, and measure both.

    `config` applies to every hook (its codes are divided among the heads). Raises `ValueError` unless it has k = 1.
    """
    config = config or CodebookConfig(d_sae=1000, k=1)
    if config.k != 1:
        raise ValueError(f"config has k={config.k}, but a state is forced by one code per group; use k=1.")
    machine = Machine.random(n_states, n_edges, seed)
    texts = machine.write(machine.walks(max(4 * batch_size, 20_000), walk_length, seed + 1))
    hooks = [f"blocks.{i}.{hook}" for i in range(n_layers) for hook in ("attn.hook_z", "hook_mlp_out")]
    bare = build_tiny_llama(D_VOCAB, d_model, n_layers, n_heads, texts.shape[1], seed)
    train = partial(finetune, n_steps=n_steps, batch_size=batch_size, lr=lr, seed=seed, progress=progress)
    loss_bare = _last(train(bare, texts))
    lm = load_model(deepcopy(bare.model))
    with insert(lm, config, hooks, seed) as inserted:
        loss = _last(train(lm, texts, inserted))
        numbers = measure(lm, inserted, machine, seed + 2)
    accuracy = transition_accuracy(bare, machine, machine.walks(1000, 8, seed + 3)[:, :4], seed)
    numbers |= {"loss": loss, "loss_bare": loss_bare, "accuracy_bare": accuracy}
    return FSMResult(seed, n_states, n_steps, accuracy_chance=n_edges / 10**machine.n_digits, **numbers)


def _last(losses: list[float], n: int = 50) -> float:
    """Mean of the last `n` training losses."""
    return sum(losses[-n:]) / len(losses[-n:])


def measure(lm: LanguageModel, inserted: Inserted, machine: Machine, seed: int) -> dict[str, Any]:
    """Accuracy, purity and steering of a model with its codebooks inserted."""
    fit, test = machine.walks(1000, 8, seed), machine.walks(1000, 8, seed + 1)
    codes_fit, codes_test = state_codes(inserted, machine, fit), state_codes(inserted, machine, test)
    states_fit, states_test = fit.flatten(), test.flatten()
    half = len(states_fit) // 2  # the hook is chosen on texts other than those that assign states to its codes
    halves = ((ids[:half], states_fit[:half], ids[half:], states_fit[half:]) for ids in codes_fit.values())
    known = dict(zip(codes_fit, (purity(*each) for each in halves), strict=True))
    purities = {name: purity(codes_fit[name], states_fit, ids, states_test) for name, ids in codes_test.items()}
    best = max(known, key=lambda name: known[name])
    order = torch.randperm(len(states_test), generator=torch.Generator().manual_seed(seed))
    chance = purity(codes_fit[best], states_fit[order], codes_test[best], states_test[order])
    return {
        "accuracy": transition_accuracy(lm, machine, test[:, :4], seed - 2),
        "purity": purities[best],
        "purity_hook": best,
        "purities": purities,
        "purity_chance": chance,
        **steering(lm, inserted, machine, codes_fit, states_fit, seed),
    }


def state_codes(inserted: Inserted, machine: Machine, walks: Int[Tensor, "n length"]) -> dict[str, Tensor]:
    """Codes `(n * length, kept)` on the last digit of each state, by hook name."""
    last = slice(machine.n_digits, None, machine.n_digits)
    return {name: ids[:, last].flatten(0, 1) for name, ids in inserted.codes(machine.write(walks)).items()}


def purity(codes_fit: Tensor, states_fit: Tensor, codes: Tensor, states: Tensor) -> float:
    """Mean over states of the fraction of tokens whose set of codes represents their state; an unseen set represents none."""
    sets, of = torch.cat([codes_fit, codes]).unique(dim=0, return_inverse=True)
    n_states = int(torch.cat([states_fit, states]).max()) + 1
    counts = torch.bincount(of[: len(codes_fit)] * n_states + states_fit, minlength=len(sets) * n_states)
    most, stands_for = counts.view(len(sets), n_states).max(1)
    right = (stands_for.where(most > 0, -1)[of[len(codes_fit) :]] == states).float()
    total = torch.bincount(states, minlength=n_states)
    return (torch.bincount(states, right, minlength=n_states) / total.clamp_min(1))[total > 0].mean().item()


def transition_accuracy(lm: LanguageModel, machine: Machine, walks: Int[Tensor, "n length"], seed: int) -> float:
    """Fraction of sampled next states that are reachable by an edge of the machine."""
    states = sample_next(lm, machine, machine.write(walks), seed)
    return allowed_share(machine, walks[:, -1], states)


def allowed_share(machine: Machine, before: Int[Tensor, " n"], after: Int[Tensor, " n"]) -> float:
    """Fraction of these pairs with an edge; -1 means an invalid state."""
    return (machine.allowed[before, after.clamp_min(0)] & (after >= 0)).float().mean().item()


def sample_next(
    lm: LanguageModel, machine: Machine, ids: Int[Tensor, "n seq"], seed: int, edits: list[Any] | None = None
) -> Int[Tensor, " n"]:
    """The state after each text, sampled digit by digit (-1: invalid)."""
    generator, start = torch.Generator().manual_seed(seed), ids.shape[1]
    with lm.steer(*edits) if edits else nullcontext():
        for _ in range(machine.n_digits):
            chosen = lm.logits(ids)[:, -1].softmax(-1).multinomial(1, generator=generator)
            ids = torch.cat([ids, chosen], 1)
    return machine.read(ids[:, start:])


def steering(
    lm: LanguageModel, inserted: Inserted, machine: Machine, codes: dict[str, Tensor], states: Tensor, seed: int
) -> dict[str, float]:
    """Force the codes of each state in turn on the last token of texts that end in other states; means over all of them."""
    walks = machine.walks(16 * machine.n_states, 4, seed + 3)
    truth, sums, n = machine.next_digit(), torch.zeros(4), 0
    for target in range(machine.n_states):
        sources = walks[target :: machine.n_states]
        sources = sources[sources[:, -1] != target]
        if not len(sources) or not bool((states == target).any()):
            continue
        ids = machine.write(sources)
        edits = _forcing(inserted, codes, states == target, ids.shape[1] - 1)
        at_target = torch.cat([sources[:, :-1], torch.full_like(sources[:, -1:], target)], 1)
        aim = truth[target].expand(len(ids), -1)
        forced = sample_next(lm, machine, ids, seed + target, edits)
        shown = (lm.logits(ids), lm.run_with_edit(ids, edits), lm.logits(machine.write(at_target)))
        found = [js_divergence(logits[:, -1].softmax(-1), aim).mean() for logits in shown]
        sums += len(ids) * torch.stack(
            [*found, torch.tensor(allowed_share(machine, aim.new_full((len(ids),), target).long(), forced))]
        )
        n += len(ids)
    names = ("js_before", "js_forced", "js_own", "accuracy_forced")
    return dict(zip(names, (sums / max(n, 1)).tolist(), strict=True))


def _forcing(inserted: Inserted, codes: dict[str, Tensor], here: Tensor, position: int) -> list[Any]:
    """Edits that force the most common code on the tokens `here`, at every hook and slot."""
    return [
        inserted.force(name, int(column.mode().values), position)
        for name, ids in codes.items()
        for column in ids[here].T
    ]
