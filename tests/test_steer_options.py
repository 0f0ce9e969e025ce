"""Which tokens `lm.steer` edits, how far it goes, what it reports, and that nobody meets another's edits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from foreign_saes import CASES
from tiny_saes import config_of
from torch import Tensor

import saelab
from saelab.errors import SteeringError
from saelab.kernels.sparse_acts import SparseActs
from saelab.models import Steering, load_model
from saelab.saes import VARIANTS, Batch, StepInfo
from saelab.saes.trained_hooks import needs_other_hooks
from saelab.steering import Direction, FeatureHandle, Plan

HOOK, EARLIER, LATER = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
PROMPT = "The weather today is fine, and <s> the river runs quietly"
SHORT = "The red hat was sold"
N_NEW = 6


class Everywhere:
    """An edit that changes every token it is shown, whatever `positions` says, and writes down which it should have changed."""

    def __init__(self, hook_name: str = HOOK, amount: float = 1.0):
        self.hook_name, self.amount, self.asked = hook_name, amount, set()

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        self.asked |= {(row, int(at)) for row, of_row in enumerate(positions) for at in of_row if at > 0}
        return x + self.amount


def activations(lm, ids: Tensor, hook: str = HOOK) -> Tensor:
    return next(iter(lm.stream_activations([ids], [hook])))[hook].clone()


@pytest.fixture(scope="module")
def sae(tiny_lm):
    made = VARIANTS["topk"](config_of("topk", 64), 32, seed=3)
    x = activations(tiny_lm, tiny_lm.to_ids(PROMPT))[0, 1:]
    made.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
    made.provenance = replace(made.provenance, origin={"hook_name": HOOK})
    return made.requires_grad_(False)


def firing(sae, lm, share: float = 0.4) -> FeatureHandle:
    """The feature whose share of firing tokens in the prompt is nearest to `share`, in units of its largest activation."""
    acts = sae.encode(activations(lm, lm.to_ids(PROMPT))[0, 1:]).to_dense().detach()
    chosen = int(((acts != 0).float().mean(0) - share).abs().argmin())
    size = float(acts[:, chosen].abs().max())
    return FeatureHandle(sae, chosen, HOOK, units={"p99": size, "max": size, "mean": size / 2})


# --- which tokens


def expected(ids: Tensor, special: tuple[int, ...], n_new: int, wanted) -> set[int]:
    """Positions in `wanted(position, n_prompt)` among those that are read: not the first, no special ones, not the last new."""
    n = len(ids)
    return {
        at
        for at in range(1, n + n_new - 1)
        if wanted(at, n) and not (at < n and int(ids[at]) in special)
    }  # fmt: skip


WHERE = {
    "both": ({}, lambda at, n: True),
    "prompt": ({"on": "prompt"}, lambda at, n: at < n),
    "generated": ({"on": "generated"}, lambda at, n: at >= n),
    "window": ({"window": (2, 5)}, lambda at, n: 2 <= at < 5),
    "window from the end of the prompt": ({"window": (-2, None)}, lambda at, n: at >= n - 2),
    "window up to there": ({"window": (None, -2)}, lambda at, n: at < n - 2),
    "window of generated tokens": ({"window": (-2, None), "on": "generated"}, lambda at, n: at >= n),
    "positions": ({"positions": [2, -1]}, lambda at, n: at in (2, n - 1)),
    "positions of the prompt": ({"positions": [2, 1000], "on": "prompt"}, lambda at, n: at == 2),
}


@pytest.mark.parametrize("case", WHERE)
def test_the_tokens_of_each_option(tiny_lm, case):
    """In cached generation, alone and in a batch that is padded on the left; an edit that ignores positions is held to them."""
    options, wanted = WHERE[case]
    rows = [tiny_lm.to_ids(text)[0] for text in (PROMPT, SHORT)]
    assert any(int(token) in tiny_lm.special_ids for token in rows[0][1:])
    edit = Everywhere()
    with tiny_lm.steer(edit, **options):
        tiny_lm.generate([PROMPT, SHORT], N_NEW)
    want = {(i, at) for i, row in enumerate(rows) for at in expected(row, tiny_lm.special_ids, N_NEW, wanted)}
    assert edit.asked == want and want
    (report,) = tiny_lm.last_report
    assert report.n_applied == len(want) and report.n_changed == len(want)
    alone = Everywhere()
    with tiny_lm.steer(alone, **options):
        tiny_lm.generate(PROMPT, N_NEW)
    assert {at for _, at in alone.asked} == {at for row, at in want if row == 0}


class WritesIntoX(Everywhere):
    """As `Everywhere`, but into the tensor that it is shown."""

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        x += self.amount
        return x


class IsNotANumber(Everywhere):
    """As `Everywhere`, with NaN where it has no business."""

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        return torch.where((positions > 0)[..., None], x + self.amount, torch.nan)


@pytest.mark.parametrize("kind", [Everywhere, WritesIntoX, IsNotANumber])
@pytest.mark.parametrize("options", [{}, {"window": (0, 4)}, {"positions": [-10, 2]}, {"cap": 1.0, "keep_norm": True}])
def test_tokens_that_are_left_alone_keep_their_bits(tiny_lm, kind, options):
    """The first token, special tokens and padding, whatever an edit does to them; alone or beside others, in one block or two."""
    batch = tiny_lm.to_batch([PROMPT, SHORT])
    special = torch.isin(batch.ids, torch.tensor(tiny_lm.special_ids))
    assert bool((special & (batch.positions > 0)).any()) and len(batch.rows()[1]) == 10  # so that -10 is its first
    free = (batch.positions > 0) & ~special

    def ran(*blocks: list) -> Tensor:
        with contextlib.ExitStack() as stack:
            for edits in blocks:
                stack.enter_context(tiny_lm.steer(*edits, **options))
            found = tiny_lm.logits(batch.ids, positions=batch.positions)
            x = _edited(tiny_lm, batch)
        assert bool(found[batch.positions >= 0].isfinite().all())
        return x

    plain = _edited(tiny_lm, batch)
    for blocks in (
        [[kind()]],
        [[kind(), Everywhere(amount=0.5)]],
        [[kind()], [kind()]],
        [[kind(), Everywhere(amount=0.0)]],
    ):
        x = ran(*blocks)
        assert torch.equal(x[~free], plain[~free])
        assert not torch.equal(x[free], plain[free])


def _edited(lm, batch) -> Tensor:
    """The activations behind the edits at `HOOK`, of padded texts."""
    return lm._capture(batch.ids, batch.positions, [HOOK])[HOOK].clone()


def test_an_edit_that_writes_into_x_is_reported(tiny_lm):
    reports = []
    for edit in (Everywhere(), WritesIntoX()):
        with tiny_lm.steer(edit):
            tiny_lm.logits(PROMPT)
        reports.append(tiny_lm.last_report[0]._replace(edits=()))
    assert reports[0] == reports[1] and reports[0].n_changed


def test_a_named_position_may_be_special(tiny_lm):
    ids = tiny_lm.to_ids(PROMPT)[0].tolist()
    special = next(at for at in range(1, len(ids)) if ids[at] in tiny_lm.special_ids)
    plain = activations(tiny_lm, tiny_lm.to_ids(PROMPT))
    for options, changed in (({}, False), ({"positions": [special]}, True)):
        with tiny_lm.steer(Direction(torch.ones(32), HOOK) * 3.0, **options):
            moved = (activations(tiny_lm, tiny_lm.to_ids(PROMPT)) != plain).any(-1)[0]
        assert bool(moved[special]) == changed and not moved[0]


NOWHERE = {
    "generated, but nothing is": (lambda lm: lm.logits(PROMPT), {"on": "generated"}),
    "beyond the end": (lambda lm: lm.logits(PROMPT), {"positions": [99]}),
    "before the start": (lambda lm: lm.logits(PROMPT), {"window": (None, -99)}),
    "a prompt of one token": (lambda lm: lm.logits([[5]]), {}),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_edits_that_apply_nowhere_are_an_error(tiny_lm, case):
    call, options = NOWHERE[case]
    plain = tiny_lm.logits(PROMPT)
    with (
        pytest.raises(SteeringError, match="Everywhere.*applied to none of the"),
        tiny_lm.steer(Everywhere(), **options),
    ):
        call(tiny_lm)
    assert torch.equal(tiny_lm.logits(PROMPT), plain)


def test_a_silent_feature_is_no_error(tiny_lm, sae):
    """It applies, and has nothing to change."""
    silent = FeatureHandle(sae, 5, HOOK, units={"p99": 1.0})
    bias = float(sae.b_enc[5])
    sae.b_enc[5] = -1e6
    try:
        with tiny_lm.steer(silent.ablate()):
            tiny_lm.logits(PROMPT)
    finally:
        sae.b_enc[5] = bias
    (report,) = tiny_lm.last_report
    assert report.n_applied and report.n_changed == 0 and report.relative_change == 0.0


def test_a_text_that_ends_at_once_is_no_error(tiny_lm):
    """No generated token was read, so there was none to steer; and the first token of a prompt is never steered."""
    for prompt, options in ((PROMPT, {"on": "generated"}), ([[5]], {})):
        with tiny_lm.steer(Everywhere(), **options):
            tiny_lm.generate_ids(prompt, 1)
        assert tiny_lm.last_report[0].n_applied == 0


def test_a_callback_that_runs_the_model_does_not_spoil_the_report(tiny_lm):
    with tiny_lm.steer(Direction(torch.ones(32), HOOK) * 1.0):
        tiny_lm.generate(PROMPT, 4)
        want = tiny_lm.last_report
        tiny_lm.generate(PROMPT, 4, on_token=lambda n: tiny_lm.logits(SHORT) is None)
    assert tiny_lm.last_report == want


# --- how far


def test_norm_cap_and_report_by_hand(tiny_lm):
    ids = tiny_lm.to_ids(SHORT)
    plain = activations(tiny_lm, ids)[0]
    vector = torch.linspace(-1, 2, 32) * 5
    change = vector.expand_as(plain[1:])
    size = plain[1:].norm(dim=-1, keepdim=True)
    limit = float((change.norm(dim=-1) / size.squeeze(1)).median())
    capped = change * (limit * size / change.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    over = change.norm(dim=-1) > limit * size.squeeze(1)
    assert over.any() and not over.all()

    def kept(x: Tensor) -> Tensor:
        return x * (size / x.norm(dim=-1, keepdim=True))

    cases = [
        ({}, plain[1:] + change, 0),
        ({"keep_norm": True}, kept(plain[1:] + change), 0),
        ({"cap": limit}, plain[1:] + capped, int(over.sum())),
        ({"cap": limit, "keep_norm": True}, kept(plain[1:] + capped), int(over.sum())),
    ]
    for options, want, n_capped in cases:
        with tiny_lm.steer(Direction(vector, HOOK) * 1.0, **options):
            steered = activations(tiny_lm, ids)[0]
        (report,) = tiny_lm.last_report
        assert torch.equal(steered[0], plain[0]) and torch.allclose(steered[1:], want, atol=1e-4), options
        assert (report.n_read, report.n_applied, report.n_changed) == (len(plain), len(plain) - 1, len(plain) - 1)
        assert report.n_capped == n_capped and report.hook_name == HOOK
        share = ((want - plain[1:]).norm(dim=-1) / size.squeeze(1)).mean()
        assert abs(report.relative_change - float(share)) < 1e-4


def test_limits_hold_for_any_size_of_change(tiny_lm):
    ids = tiny_lm.to_ids(SHORT)
    size = activations(tiny_lm, ids)[0, 1:].norm(dim=-1)
    with tiny_lm.steer(Direction(torch.ones(32), HOOK) * 1e25, keep_norm=True):
        torch.testing.assert_close(activations(tiny_lm, ids)[0, 1:].norm(dim=-1), size)
    with tiny_lm.steer(Direction(torch.ones(32), HOOK) * 1e25, cap=0.5):
        activations(tiny_lm, ids)
    assert abs(tiny_lm.last_report[0].relative_change - 0.5) < 1e-4


def test_blocks_that_set_the_same_are_refused_and_options_need_edits(tiny_lm):
    direction = Direction(torch.ones(32), HOOK)
    with (
        tiny_lm.steer(direction.ablate()),
        pytest.raises(ValueError, match="both set"),
        tiny_lm.steer(direction.ablate()),
    ):
        pass
    for options in ({"on": "prompt"}, {"cap": 0.5}):
        with pytest.raises(ValueError, match="there is no edit"), tiny_lm.steer(**options):
            pass
    with pytest.raises(ValueError, match="cap: a plan has these"), tiny_lm.steer(Plan([direction * 1.0]), cap=0.0):
        pass


def test_limits_are_of_the_sum_at_a_hook_and_no_op_with_nothing_to_limit(tiny_lm):
    up, down = Direction(torch.ones(32), HOOK) * 50.0, Direction(torch.ones(32), HOOK) * -50.0
    ids = tiny_lm.to_ids(SHORT)
    plain = activations(tiny_lm, ids)
    with tiny_lm.steer(up, down, cap=0.01, keep_norm=True):
        assert torch.allclose(activations(tiny_lm, ids), plain, atol=1e-5)
    with tiny_lm.steer(Direction(torch.ones(32), HOOK).scale(1.0), keep_norm=True, cap=0.5):
        assert torch.equal(activations(tiny_lm, ids), plain)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"on": "answer"}, "on='answer' is unknown.*'prompt'"),
        ({"positions": [0, 3]}, "has 0, the first token"),
        ({"positions": []}, "positions=\\[\\]"),
        ({"positions": [1.5]}, "expected integers"),
        ({"window": (3, 3)}, "is empty"),
        ({"window": (1, 2, 3)}, "expected a start and an end"),
        ({"window": ("a", None)}, "start and end are integers"),
        ({"positions": [1], "window": (1, 2)}, "give one of the two"),
        ({"cap": 0.0}, "cap=0.0"),
        ({"keep_norm": "no"}, "keep_norm='no'"),
        ({"positions": [2**40]}, "at most 10000 are possible"),
        ({"cap": float("nan")}, "cap=nan"),
        ({"gate": 3.0}, "gate=3.0 is no gate"),
    ],
)
def test_options_that_cannot_be_met(options, words):
    with pytest.raises(ValueError, match=words):
        Steering([Everywhere()], **options)


def test_two_edits_that_set_one_feature_are_refused(sae):
    feature = FeatureHandle(sae, 5, HOOK, units={"p99": 1.0})
    with pytest.raises(ValueError, match="both set the same activation"):
        Plan([feature.clamp(1.0), feature.ablate()])
    direction = Direction(torch.ones(32), HOOK)
    with pytest.raises(ValueError, match="both set the same activation"):
        Plan([direction.clamp(1.0), direction.project_out()])
    again = Direction(-2 * torch.ones(32), HOOK)
    for one, other in ((direction.project_out(), again.clamp(1.0)), (feature.project_out(), feature.project_out())):
        with pytest.raises(ValueError, match="both set the same activation"):
            Plan([one, other])
    with pytest.raises(ValueError, match="both set the same activation"):
        Plan([feature.clamp(1.0), feature.clamp(2.0, where="fires")])
    other = FeatureHandle(sae, 6, HOOK, units={"p99": 1.0})
    assert Plan([feature.clamp(1.0), feature * 1.0, feature * 2.0, other.ablate()])


# --- gates


def test_gates_by_hand(tiny_lm, sae, caplog):
    feature = firing(sae, tiny_lm)
    ids = tiny_lm.to_ids(PROMPT)
    plain = {hook: activations(tiny_lm, ids, hook)[0] for hook in (EARLIER, HOOK)}
    z = sae.encode(plain[HOOK]).column(feature.feature)
    along = plain[EARLIER] @ torch.ones(32) / 32**0.5
    middle = float(along[1:].median()) + 1e-3
    special = torch.isin(ids[0], torch.tensor(tiny_lm.special_ids))
    cases = [
        (feature.above(0.3), z > 0.3 * feature.units["p99"]),
        (Direction(torch.ones(32) * 7, EARLIER).above(middle), along > middle),
    ]
    for gate, is_open in cases:
        with tiny_lm.steer(Direction(torch.ones(32), HOOK) * 3.0, gate=gate):
            moved = (activations(tiny_lm, ids)[0] != plain[HOOK]).any(-1)
        want = is_open & ~special & (torch.arange(len(z)) > 0)
        assert torch.equal(moved, want) and want.any() and not want[1:].all()
        assert tiny_lm.last_report[0].n_applied == int(want.sum())
    with tiny_lm.steer(Everywhere(), gate=feature.above(1e6)):  # a gate that stays shut is no error: it says so
        assert torch.equal(tiny_lm.logits(PROMPT), tiny_lm.logits(PROMPT))
    assert tiny_lm.last_report[0].n_applied == 0 and "was open at none of the" in caplog.text
    lost = Direction(torch.ones(32), "blocks.9.hook_resid_post").above(0.0)
    for edit, gate, words in (
        (Everywhere(EARLIER), feature.above(0.3), "must read that hook"),
        (Everywhere(), lost, "Nearest"),
    ):
        with pytest.raises(ValueError, match=words), tiny_lm.steer(edit, gate=gate):
            pass


# --- every variant, and every SAE of other libraries


def with_change(codes, feature, change):
    dense = codes.to_dense()
    dense[:, feature] += change
    return SparseActs.from_dense(dense)


def _check_every_edit(lm, sae):
    """No-ops keep every bit; the rest is the difference of two decodes, at tokens whose activation changes."""
    feature = firing(sae, lm)
    ids = lm.to_ids(PROMPT)
    plain = activations(lm, ids)[0]
    codes = sae.encode(plain)
    z = codes.column(feature.feature)
    special = torch.isin(ids[0], torch.tensor(lm.special_ids))
    free = ~special & (torch.arange(len(z)) > 0)
    assert bool((z[free] != 0).any())
    decoder, scale = sae.decoder()
    row = decoder[feature.feature].float() / scale.float()
    unit = row / row.norm()
    size = feature.units["p99"]
    logits = lm.logits(PROMPT)
    for edit in (feature.scale(1.0), feature * 0.0, feature.clamp(z, unit="raw"), feature.cap(-9.0, 9.0)):
        assert torch.equal(lm.run_with_edit(PROMPT, edit), logits), edit
    changes = [
        (feature * 2.0, torch.full_like(z, 2 * size)),
        (feature.clamp(1.5), 1.5 * size - z),
        (feature.clamp(1.5, where="fires"), torch.where(z != 0, 1.5 * size - z, 0.0)),
        (feature.scale(0.5), -0.5 * z),
        (feature.ablate(), -z),
        (feature.cap(max=0.5), z.clamp(max=0.5 * size) - z),
    ]
    for edit, change in changes:
        with lm.steer(edit):
            steered = activations(lm, ids)[0]
        moved = sae.decode(with_change(codes, feature.feature, change * free), plain) - sae.decode(codes, plain)
        torch.testing.assert_close(steered, plain + moved, atol=2e-4, rtol=1e-4)
        assert torch.equal(steered[change * free == 0], plain[change * free == 0]), edit
    with lm.steer(feature.project_out()):
        torch.testing.assert_close(
            (activations(lm, ids)[0] @ unit)[free], torch.zeros(int(free.sum())), atol=1e-4, rtol=0
        )
    with lm.steer(feature.add(0.5, unit="resid_norm")):
        want = plain + 0.5 * (plain.norm(dim=-1) * free)[:, None] * unit
        torch.testing.assert_close(activations(lm, ids)[0], want, atol=2e-4, rtol=1e-4)


def _steerable_alone(sae) -> bool:
    return (
        not needs_other_hooks(sae) and sae.shape.get("n_sources", 1) == 1 and not sae.provenance.origin.get("partial")
    )


@pytest.mark.parametrize("name", [name for name in VARIANTS if "coder" not in name and name != "codebook"])
def test_every_variant(tiny_lm, name):
    x = activations(tiny_lm, tiny_lm.to_ids(PROMPT))[0, 1:]
    sae = VARIANTS[name](config_of(name, 64), 32, seed=3)
    sae.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
    sae.loss(
        Batch(x, x), StepInfo(torch.zeros(64, dtype=torch.bool), 10, 100)
    )  # sets the threshold of those that have one
    sae.provenance = replace(sae.provenance, origin={"hook_name": HOOK})
    _check_every_edit(tiny_lm, sae.requires_grad_(False))


@pytest.mark.parametrize("name", CASES)
def test_every_imported_sae(tiny_lm, tmp_path, name):
    foreign = CASES[name](tmp_path / "sae")
    sae = saelab.load_sae(foreign.path, assume=foreign.assume)
    if foreign.partial or not _steerable_alone(sae):
        with pytest.raises(ValueError):
            FeatureHandle(sae, 3, None if sae.provenance.origin.get("hook_name") else HOOK).clamp(1.0, "raw")
        return
    _check_every_edit(tiny_lm, sae)


# --- arms of one batch, and nobody meets another's edits


def test_arms_are_what_each_is_alone(tiny_lm, sae):
    """The same random numbers, whatever else is in the batch."""
    feature = firing(sae, tiny_lm)
    arms = [
        None,
        Plan([feature * 4.0]),
        Plan([feature * 4.0], on="prompt"),
        Plan([Direction(torch.ones(32), EARLIER) * 2.0]),
    ]
    found = tiny_lm.generate_arms(PROMPT, arms, N_NEW, temperature=1.0, seed=5, n_seeds=2)
    texts = set()
    for arm, of_arm in zip(arms, found, strict=True):
        for seed, generation in zip((5, 6), of_arm, strict=True):
            with tiny_lm.steer(*([arm] if arm else [])):
                alone = tiny_lm.generate_ids(PROMPT, N_NEW, temperature=1.0, seed=seed)
            assert torch.equal(generation.ids, alone.ids)
            texts.add(tuple(generation.ids.tolist()))
    assert len(texts) > 4
    assert {report.hook_name for report in tiny_lm.last_report} == {EARLIER}  # of the last call alone


def test_coroutines_do_not_meet(tiny_lm):
    plain = tiny_lm.logits(PROMPT)
    alone = tiny_lm.run_with_edit(PROMPT, Everywhere(amount=2.0))

    async def steered(amount: float) -> Tensor:
        with tiny_lm.steer(Everywhere(amount=amount)):
            await asyncio.sleep(0.01)
            found = tiny_lm.logits(PROMPT)
            await asyncio.sleep(0.01)
            assert len(tiny_lm.edits) == 1
        return found

    async def both():
        return await asyncio.gather(steered(2.0), steered(0.0), steered(2.0))

    first, nothing, second = asyncio.run(both())
    assert torch.equal(first, alone) and torch.equal(second, alone) and torch.equal(nothing, plain)
    assert tiny_lm.edits == () and torch.equal(tiny_lm.logits(PROMPT), plain)


@pytest.mark.parametrize("how", ["callback", "edit", "generator"])
def test_what_ends_early_leaves_the_model_as_it_was(tiny_lm, how):
    plain = tiny_lm.logits(PROMPT)

    class Breaks(Everywhere):
        def apply(self, x: Tensor, positions: Tensor) -> Tensor:
            raise KeyboardInterrupt

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    def blocks():
        with tiny_lm.steer(Everywhere()):
            yield tiny_lm.generate(PROMPT, 2)
            yield "never"

    if how == "generator":
        going = blocks()
        next(going)
        going.close()
    else:
        edit, told = (Breaks(), None) if how == "edit" else (Everywhere(), stop)
        with pytest.raises(KeyboardInterrupt), tiny_lm.steer(edit):
            tiny_lm.generate(PROMPT, N_NEW, on_token=told)
    assert tiny_lm.edits == () and torch.equal(tiny_lm.logits(PROMPT), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_lm.model.modules())


def test_two_threads_get_their_own_texts(tiny_lm):
    want = {}
    for amount in (0.5, 3.0):
        with tiny_lm.steer(Everywhere(amount=amount)):
            want[amount] = tiny_lm.generate(PROMPT, N_NEW)
    got: dict[float, list[str]] = {0.5: [], 3.0: []}

    def run(amount: float) -> None:
        for _ in range(3):
            with tiny_lm.steer(Everywhere(amount=amount)):
                got[amount].append(tiny_lm.generate(PROMPT, N_NEW))

    threads = [threading.Thread(target=run, args=(amount,)) for amount in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert want[0.5] != want[3.0] and all(got[amount] == [want[amount]] * 3 for amount in got)


def test_bf16_and_a_bridge_are_steered_alike(tiny_folder, sae):
    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.float32}):
        lm = load_model(tiny_folder, device="cpu", **options)
        with lm.steer(firing(sae, lm) * 2.0, on="prompt", cap=0.2):
            lm.logits(PROMPT)
        (report,) = lm.last_report
        assert report.n_changed == report.n_applied > 0 and 0 < report.relative_change <= 0.21


@pytest.mark.parametrize("how", ["closed", "exhausted", "dropped"])
def test_a_block_may_end_in_another_thread(tiny_lm, how):
    """A generator that holds it open: afterwards nothing is steered, anywhere, and every thread gets the model."""
    plain = tiny_lm.logits(PROMPT)

    def steered():
        with tiny_lm.steer(Everywhere()):
            yield tiny_lm.logits(PROMPT)

    going = [steered()]
    assert not torch.equal(next(going[0]), plain) and len(tiny_lm.edits) == 1
    in_thread = {"closed": lambda: going[0].close(), "exhausted": lambda: list(going[0]), "dropped": going.clear}[how]
    assert in_another_thread(in_thread) in (None, [])
    assert torch.equal(in_another_thread(lambda: tiny_lm.logits(PROMPT)), plain)
    assert tiny_lm.edits == () and torch.equal(tiny_lm.logits(PROMPT), plain)
    with tiny_lm.steer(Everywhere(amount=2.0)):  # and it can be steered again
        assert [edit.amount for edit in tiny_lm.edits] == [2.0]
    assert tiny_lm.edits == ()


def test_a_block_that_ends_elsewhere_leaves_the_others(tiny_lm):
    """The thread goes on with its other block, and keeps the model."""
    outer = tiny_lm.run_with_edit(PROMPT, Everywhere(amount=2.0))

    def inner():
        with tiny_lm.steer(Everywhere()):
            yield

    got: list[Tensor] = []
    other = threading.Thread(target=lambda: got.append(tiny_lm.logits(PROMPT)), daemon=True)
    with tiny_lm.steer(Everywhere(amount=2.0)):
        going = inner()
        next(going)
        in_another_thread(going.close)
        assert torch.equal(tiny_lm.logits(PROMPT), outer)
        other.start()
        other.join(0.2)
        assert other.is_alive() and not got
    other.join(30)
    assert torch.equal(got[0], tiny_lm.logits(PROMPT))


def test_a_coroutine_does_not_outlive_the_block(tiny_lm):
    plain = tiny_lm.logits(PROMPT)

    async def late(ended: asyncio.Event) -> Tensor:
        await ended.wait()
        return tiny_lm.logits(PROMPT)

    async def outer() -> Tensor:
        ended = asyncio.Event()
        with tiny_lm.steer(Everywhere()):
            task = asyncio.create_task(late(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    assert torch.equal(asyncio.run(outer()), plain)


def in_another_thread(call):
    """What the call returns there; a call that hangs fails."""
    found: list = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert found and not isinstance(found[0], BaseException), found or "it hangs"
    return found[0]


# --- what edits share


class Alone:
    """An edit that shares nothing with others."""

    def __init__(self, edit):
        self.hook_name, self.edit = edit.hook_name, edit

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.edit.apply(x, positions)


def test_edits_of_one_sae_encode_once(tiny_lm, sae, monkeypatch):
    """Once for each hook, pass and block, and with the bits that every edit has alone."""
    other = VARIANTS["topk"](config_of("topk", 64), 32, seed=4).requires_grad_(False)
    edits = [FeatureHandle(sae, i, HOOK).clamp(0.5 + i / 9, unit="raw") for i in range(40)]
    edits += [FeatureHandle(sae, 41, HOOK).ablate(), FeatureHandle(sae, 42, HOOK).add(1.0, unit="raw")]
    edits += [FeatureHandle(other, i, HOOK).clamp(0.5, unit="raw") for i in range(2)]
    edits += [FeatureHandle(sae, i, LATER).clamp(0.5, unit="raw") for i in range(2)]
    alone = tiny_lm.run_with_edit(PROMPT, [Alone(edit) for edit in edits])
    counts = {id(one): 0 for one in (sae, other)}
    for one in (sae, other):

        def counted(x, one=one, encode=one.encode):
            counts[id(one)] += 1
            return encode(x)

        monkeypatch.setattr(one, "encode", counted)
    assert torch.equal(tiny_lm.run_with_edit(PROMPT, edits), alone)
    assert counts == {id(sae): 2, id(other): 1}
    with tiny_lm.steer(*edits):
        assert torch.equal(tiny_lm.logits(PROMPT), alone) and torch.equal(tiny_lm.logits(PROMPT), alone)
    assert counts == {id(sae): 6, id(other): 3}
