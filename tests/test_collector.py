"""What one pass gathers, against the plain definition of each statistic over every non-zero activation, for every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, rows

from saelab.features.collecting import kept, largest, near_misses, token_sample
from saelab.features.collecting.accumulate import N_UNIFORM, PER_OCTAVE
from saelab.features.collecting.collector import Collector
from saelab.features.collecting.entries import float_rank, token_hash
from saelab.features.collecting.near_misses import N_MISSES, Margins
from saelab.features.schema import N_BINS, OCTAVES, WINDOW_LEFT, WINDOW_RIGHT, bin_edges
from saelab.saes import VARIANTS

CTX, TOP_K, N = 16, 6, 320
CASES = [name for name in VARIANTS if not name.startswith("cross")]
FEW = ["topk", "abs_topk", "jumprelu", "relu", "matching_pursuit"]


@pytest.fixture(scope="module", autouse=True)
def often():
    """Buffers of a few entries, so that they are sorted many times; one token in four is searched for near misses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "_WAITING", 60)
        patch.setattr(largest, "_WAITING", 60)
        patch.setattr(near_misses, "ONE_IN", 4)
        patch.setattr(token_sample, "MAX_TOKENS", 60)
        yield


class World:
    """Rows of 40 contexts, three documents in two contexts; one token in nine is masked."""

    def __init__(self, name: str):
        self.sae = build(name)
        self.x = rows(N, 1)
        self.tokens = torch.arange(N)[torch.arange(N) % 9 != 3]
        self.docs = torch.arange(N) * 3 // (2 * CTX)
        with torch.no_grad():
            acts = self.sae.encode(self.x[self.tokens])
        self.dense = acts.to_dense().detach()
        self.margins = Margins(self.sae, self.x[self.tokens], acts).dense()

    @torch.no_grad()
    def collect(self, first: int, last: int, batch: int = 5) -> Collector:
        """The state after the contexts from first to last."""
        state = Collector(D_SAE, CTX, TOP_K)
        for start in range(first * CTX, last * CTX, batch * CTX):
            stop = min(start + batch * CTX, last * CTX)
            tokens = self.tokens[(self.tokens >= start) & (self.tokens < stop)]
            state.update(self.sae, self.x[tokens], tokens, self.docs[tokens])
        return state


@pytest.fixture(scope="module", params=CASES)
def world(request):
    return World(request.param)


@pytest.fixture(scope="module")
def state(world):
    return world.collect(0, N // CTX)


@pytest.fixture(scope="module", params=FEW)
def one(request):
    """Of a variant of each kind of selection, and its state."""
    world = World(request.param)
    return world, world.collect(0, N // CTX)


def signs(world):
    return (1, -1) if bool((world.dense < 0).any()) else (1,)


def test_counts_sums_and_histogram_are_those_of_every_value(world, state):
    for sign in signs(world):
        end, values = state.ends.ends[sign], (sign * world.dense).clamp_min(0)
        assert torch.equal(end.n_fired, (values > 0).sum(0))
        torch.testing.assert_close(end.total, values.double().sum(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(end.total_square, values.double().square().sum(0), rtol=1e-9, atol=0)
        fired = end.n_fired > 0
        assert torch.equal(end.maximum[fired], values.amax(0)[fired])
        edges = torch.tensor(bin_edges())
        for feature in range(0, D_SAE, 7):
            column = values[:, feature][values[:, feature] > 0]
            bins = torch.bucketize(column, edges, right=True) - 1
            assert torch.equal(
                end.histogram[feature].long(), torch.bincount(bins.clamp(0, N_BINS - 1), minlength=N_BINS)
            )


def test_p99_is_the_quantile(one):
    world, state = one
    for sign in signs(world):
        p99, exact = state.ends.ends[sign].quantile(0.99)
        assert bool(exact.all())
        for feature in range(D_SAE):
            values = (sign * world.dense[:, feature]).double()
            values = values[values > 0]
            if len(values):
                assert float(p99[feature]) == pytest.approx(float(values.quantile(0.99)), rel=1e-12)
            else:
                assert bool(p99[feature].isnan())


def plain_order(values, tokens, docs, k, one_per_document):
    """Token numbers of the k best, by value and then by token."""
    best = sorted(zip((-values).tolist(), tokens.tolist(), docs.tolist(), strict=True))
    chosen, seen = [], set()
    for _, token, doc in best:
        if not (one_per_document and doc in seen):
            chosen.append(token)
            seen.add(doc)
    return chosen[:k]


def test_examples_are_the_best_by_the_plain_rule(one):
    world, state = one
    docs = world.docs[world.tokens]
    hashes = token_hash(world.tokens)
    for sign in signs(world):
        end = state.ends.ends[sign]
        for feature in range(D_SAE):
            values = sign * world.dense[:, feature]
            here = values > 0
            tokens = world.tokens[here]
            found = end.kept["examples"].examples.of(feature)
            assert found.token.tolist() == plain_order(values[here].double(), tokens, docs[here], TOP_K, True)
            by_hash = end.kept["uniform"].examples.of(feature)
            assert by_hash.token.tolist() == tokens[torch.argsort(hashes[here])][:N_UNIFORM].tolist()
            octave = values[here].log2().floor().long()
            for number in octave.unique().tolist():
                chosen = tokens[octave == number]
                wanted = chosen[torch.argsort(token_hash(chosen))][:PER_OCTAVE].tolist()
                group = feature * OCTAVES + number + 24
                assert end.kept["octave"].examples.of(group).token.tolist() == wanted


def test_windows_show_the_feature_within_the_context(one):
    world, state = one
    everything = torch.zeros(N, D_SAE)
    everything[world.tokens] = world.dense
    for sign in signs(world):
        for name in ("examples", "uniform"):
            examples = state.ends.ends[sign].kept[name].examples
            windows = examples.windows.dense()
            for i in range(0, len(examples.group), 11):
                token, feature = int(examples.token[i]), int(examples.group[i])
                for column in range(WINDOW_LEFT + 1 + WINDOW_RIGHT):
                    other = token + column - WINDOW_LEFT
                    inside = 0 <= other < N and other // CTX == token // CTX
                    assert float(windows[i, column]) == (float(everything[other, feature]) if inside else 0.0)


def test_near_misses_are_the_silent_tokens_of_largest_margin(one):
    world, state = one
    looked = token_hash(world.tokens) % 4 == 0
    tokens, docs = world.tokens[looked], world.docs[world.tokens][looked]
    for feature in range(D_SAE):
        silent = world.dense[looked, feature] == 0
        missed = world.margins[looked, feature][silent]
        found = state.near_misses.examples.of(feature)
        assert len(found.token) == min(N_MISSES, len(docs[silent].unique()))
        best = {}
        for value, doc in zip(missed.tolist(), docs[silent].tolist(), strict=True):
            best[doc] = max(best.get(doc, -1e9), value)
        assert found.value.tolist() == pytest.approx(sorted(best.values(), reverse=True)[:N_MISSES], rel=1e-4, abs=1e-5)
        assert set(found.token.tolist()) <= set(tokens[silent].tolist())


def test_the_token_sample_holds_whole_tokens(one):
    world, state = one
    tokens, offsets, features = state.sample.csr()
    level = state.sample.level
    wanted = world.tokens[token_hash(world.tokens) & ((1 << level) - 1) == 0]
    assert torch.equal(tokens, wanted) and 30 < len(tokens) <= 60 and level > 0
    more = (token_hash(world.tokens) & ((1 << (level - 1)) - 1) == 0).sum()
    assert more > 60
    row = {int(token): i for i, token in enumerate(world.tokens)}
    for i, token in enumerate(tokens.tolist()):
        fired = world.dense[row[token]].nonzero().flatten()
        assert features[offsets[i] : offsets[i + 1]].tolist() == fired.tolist()


def same(one: Collector, other: Collector) -> None:
    found, wanted = one.tensors(), other.tensors()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        if name.rpartition(".")[2] in ("total", "total_square"):
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(tensor, wanted[name]), name


def test_states_merge_to_that_of_the_whole(world, state):
    cuts = [(0, 4), (4, 5), (5, 16), (16, N // CTX)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = Collector(D_SAE, CTX, TOP_K)
        for i in order:
            merged.merge(world.collect(*cuts[i], batch=3))
        same(merged, state)


def test_batches_and_buffers_do_not_change_the_state(one, monkeypatch):
    world, state = one
    same(world.collect(0, N // CTX, batch=1), state)
    monkeypatch.setattr(kept, "_WAITING", 1 << 20)
    monkeypatch.setattr(largest, "_WAITING", 1 << 20)
    same(world.collect(0, N // CTX, batch=40), state)


def test_a_saved_state_goes_on(one, tmp_path: Path):
    world, state = one
    world.collect(0, 9).save(tmp_path / "s.safetensors", {"one": "thing"})
    loaded = Collector(D_SAE, CTX, TOP_K)
    assert loaded.load(tmp_path / "s.safetensors") == {"one": "thing"}
    same(loaded, world.collect(0, 9))
    loaded.merge(world.collect(9, N // CTX))
    same(loaded, state)


def test_floats_and_their_ranks_have_one_order():
    values = torch.tensor([-float("inf"), -3e38, -1.5, -1.0, -1e-40, 0.0, 1e-40, 1e-3, 1.0, 1.5, 3e38, float("inf")])
    assert (float_rank(values).diff() > 0).all()


def test_memory_does_not_grow_with_the_number_of_tokens():
    """What is held after a pass ten times as long is no more once every group is full."""
    sae, sizes = build("topk"), []
    state = Collector(D_SAE, CTX, TOP_K)
    for step in range(60):
        x = rows(CTX * 20, step)
        tokens = torch.arange(CTX * 20) + step * CTX * 20
        with torch.no_grad():
            state.update(sae, x, tokens, tokens // 40)
        held = [state.near_misses, *(one for end in state.ends.ends.values() for one in end.kept.values())]
        sizes.append(sum(len(batch.group) for one in held for batch in one._batches))
        assert (
            len(state.sample._batches) <= 32
        )  # small blocks between the large ones of a pass keep its memory from reuse
    assert max(sizes[40:]) <= 1.1 * max(sizes[25:40])
    assert sae.d_in == D_IN


NO_NORMS = ["topk", "masked_topk", "csr", "gradient", "relu", "gba", "jumprelu", "batch_topk"]


@pytest.mark.parametrize("name", NO_NORMS)
@torch.no_grad()
def test_a_bias_that_makes_up_for_a_margin_makes_the_feature_fire(name):
    changes: dict[str, Any] = {"target_l0": 4.0} if name in ("relu", "jumprelu") else {}
    sae, x = build(name, **changes), rows(24, 7)
    sae.b_enc -= 1.0  # on some tokens fewer than k are positive
    acts = sae.encode(x)
    margins = Margins(sae, x, acts).dense().masked_fill(acts.to_dense() != 0, -torch.inf)
    for row in range(len(x)):
        margin, feature = (int(one) if one.dtype == torch.int64 else float(one) for one in margins[row].max(0))
        assert margin <= 0
        for part, fires in ((0.99, False), (1.01, True)):
            sae.b_enc[feature] -= part * margin - (1e-5 if fires else -1e-5)
            assert bool(sae.encode(x[row : row + 1]).to_dense()[0, feature]) == fires, (row, margin)
            sae.b_enc[feature] += part * margin - (1e-5 if fires else -1e-5)
