"""Error by documents: each counts once, however long and over however many contexts; special tokens apart; FAST as a preset."""

from collections import defaultdict

import pytest
import torch
from test_evaluation import HOOK, TEXTS, rebuilder

from saelab import TrainConfig, presets
from saelab.evaluation.document_error import DocumentMean, document_error
from saelab.evaluation.heldout import open_score_stream
from saelab.saes import JumpReLUConfig, ReLUConfig

OPTIONS = {"hook_name": HOOK, "ctx_len": 32, "batch_size": 3}


def test_documents_count_alike_by_hand():
    mean = DocumentMean()
    assert mean.value is None
    mean.add(torch.tensor([2, 0, 2]), torch.tensor([4.0, 3.0, 6.0]))
    mean.add(torch.tensor([2]), torch.tensor([2.0]))
    mean.add(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert mean.value == (3 + 4) / 2 and mean.counts.tolist() == [1, 0, 3]


def test_errors_equal_a_plain_computation(tiny_lm):
    """An SAE that returns half of its input is off by a quarter of the mean square."""
    texts = [*TEXTS, "user " * 50]
    words = ("user", "ys ")  # the second is in every text
    patterns = [tiny_lm.tokenizer.encode(word, add_special_tokens=False) for word in words]
    assert max(map(len, patterns)) > 1
    sae = rebuilder(32, 0.5)
    found = document_error(sae, tiny_lm, texts, special=words, **OPTIONS)
    errors = {name: defaultdict(list) for name in ("mse", "mse_kept", "mse_special")}
    for tokens, batch, keep in open_score_stream(sae, tiny_lm, texts, **OPTIONS).pairs():
        for row, ids in enumerate(tokens.ids.tolist()):
            for column, id in enumerate(ids):
                doc = int(tokens.doc[row, column])
                if doc < 0:
                    continue
                error = float(batch.x[row, column].square().mean()) / 4
                errors["mse"][doc].append(error)
                if keep[row, column]:
                    errors["mse_kept"][doc].append(error)
                starts = [(len(p), s) for p in patterns for s in range(column - len(p) + 1, column + 1) if s >= 0]
                if id in tiny_lm.special_ids or any(ids[s : s + n] in patterns for n, s in starts):
                    errors["mse_special"][doc].append(error)
    for name, by_doc in errors.items():
        want = sum(sum(one) / len(one) for one in by_doc.values()) / len(by_doc)
        assert getattr(found, name) == pytest.approx(want, rel=1e-5), name
    assert found.n_documents == len(texts)
    assert found.n_special == sum(len(one) for one in errors["mse_special"].values()) > len(texts)
    assert len({f"{value:.6f}" for value in found[:3]}) == 3


def test_an_empty_word_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="special contains '', which is 0 tokens"):
        document_error(rebuilder(32), tiny_lm, TEXTS, special=("",), **OPTIONS)


def test_the_fast_preset():
    config, run = presets.fast("relu", 64)
    assert config == ReLUConfig(512, l1_coefficient=5.0, l1_warmup=1 / 32)
    assert run == TrainConfig(40_960_000, 128, lr=7e-5, seed=42, warmup_steps=16_000, decay_fraction=0.95)
    config, run = presets.fast("jumprelu", 64, 16, 12_800, normalize="none")
    assert (config.d_sae, config.sparsity_coefficient, config.initial_threshold) == (1024, 0.01, 0.001)
    assert isinstance(config, JumpReLUConfig) and config.normalize == "none" and run.warmup_steps == 5
    with pytest.raises(ValueError, match="variant='topk' must be one of relu, jumprelu"):
        presets.fast("topk", 64)
