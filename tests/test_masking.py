"""The one mask: which rows go, for which reason, each counted once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.tokens import TokenBatch
from saelab.tokens.mask import NORM_RULE_ROWS, Mask, NormRule, row_norms, token_mask

EOS = 1


def batch_of(ids, doc=None):
    ids = torch.tensor(ids)
    return TokenBatch(ids, torch.zeros_like(ids) if doc is None else torch.tensor(doc), 0)


def test_token_mask_by_hand():
    batch = batch_of([[EOS, 5, EOS, 7], [8, 9, EOS, EOS]], [[0, 0, 0, 1], [1, 1, -1, -1]])
    out = token_mask(batch.ids, batch.doc, [EOS])
    assert out["position"].tolist() == [[True, False, False, False], [True, False, False, False]]
    assert out["special"].tolist() == [[False, False, True, False], [False, False, False, False]]
    assert out["padding"].tolist() == [[False, False, False, False], [False, False, True, True]]


def test_each_token_is_counted_once_position_before_special_before_norm():
    batch = batch_of([[EOS, EOS, 5, 6]])
    acts = {"h": torch.tensor([[[100.0], [100.0], [100.0], [1.0]]])}
    keep, counts = Mask((EOS,), {"h": 50.0}).apply(batch, acts)
    assert counts == {"position": 1, "special": 1, "norm": 1}
    assert keep.tolist() == [[False, False, False, True]]


def test_padding_is_never_kept_and_never_counted():
    keep, counts = Mask((), {"h": 1.0}).apply(batch_of([[3, 4, 5]], [[0, -1, -1]]), {"h": torch.full((1, 3, 1), 9.0)})
    assert not keep.any()
    assert counts == {"position": 1, "special": 0, "norm": 0}


def test_a_norm_too_large_at_any_hook_drops_the_row_and_the_limit_itself_is_kept():
    acts = {"a": torch.tensor([[[1.0], [5.0], [1.0]]]), "b": torch.tensor([[[1.0], [1.0], [7.5]]])}
    keep, counts = Mask((), {"a": 5.0, "b": 7.0}).apply(batch_of([[3, 4, 5]]), acts)
    assert keep.tolist() == [[False, True, False]]
    assert counts["norm"] == 1


def test_no_norm_rule_and_unknown_hook():
    acts = {"h": torch.full((1, 2, 1), 1e9)}
    keep, _ = Mask((), None).apply(batch_of([[3, 4]]), acts)
    assert keep.tolist() == [[False, True]]
    with pytest.raises(ValueError, match="no norm limit for hook 'h'.*other"):
        Mask((), {"other": 1.0}).apply(batch_of([[3, 4]]), acts)


@given(st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4), st.data())
def test_counts_and_kept_rows_add_up(ids, data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=len(ids), max_size=len(ids)))
    doc = [[0 if i < n else -1 for i in range(5)] for n in lengths]
    norms = data.draw(st.lists(st.sampled_from([1.0, 9.0]), min_size=5 * len(ids), max_size=5 * len(ids)))
    acts = {"h": torch.tensor(norms).view(len(ids), 5, 1)}
    keep, counts = Mask((0, 1), {"h": 5.0}).apply(batch_of(ids, doc), acts)
    assert int(keep.sum()) + sum(counts.values()) == sum(lengths)
    for row, kept in enumerate(keep.tolist()):
        for pos, stays in enumerate(kept):
            text = pos < lengths[row] and pos > 0 and ids[row][pos] > 1
            assert stays == (text and norms[5 * row + pos] < 5)


def test_row_norms_are_fp32_whatever_the_activations_are():
    norms = row_norms({"h": torch.full((1, 2, 100), 3.0, dtype=torch.bfloat16)})["h"]
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((1, 2), 30.0))


def test_norm_rule_takes_exactly_the_first_rows_that_ids_leave():
    rule = NormRule((EOS,))
    ids = torch.full((1, NORM_RULE_ROWS // 2 + 2), 5)
    ids[0, 1] = EOS
    batch = TokenBatch(ids, torch.zeros_like(ids), 0)
    low, high = torch.full(ids.shape, 1.0), torch.full(ids.shape, 3.0)
    low[0, :2] = 1e6  # position 0 and the special token must not enter the median
    rule.add(batch, {"h": low})
    assert not rule.ready
    rule.add(batch, {"h": high})
    assert rule.ready
    assert rule.n_rows == NORM_RULE_ROWS
    rule.add(batch, {"h": torch.full(ids.shape, 1e6)})
    assert rule.medians() == {"h": 1.0}  # the lower middle of as many ones as threes
    assert rule.max_norms() == {"h": 5.0}
