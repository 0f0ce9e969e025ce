"""Several prompts at once: every reader takes the same containers, and refuses what would yield something else."""

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset

from saelab.edits.feature_handle import FeatureHandle
from saelab.saes import CrosscoderConfig, TopKConfig, TopKSAE
from saelab.steering import diff_means, effect_table
from saelab.tokens import pack

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["The weather today", "the river bank"]
FRAME = pandas.DataFrame({"text": TEXTS, "n": [1, 2]})
TAKEN = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "generator": TEXTS,
    "NumPy": np.array(TEXTS, dtype=object),
    "column of a data frame": FRAME["text"],
    "column of a dataset": Dataset.from_dict({"text": TEXTS})["text"],
}
REFUSED = {
    "data frame": FRAME,
    "dict of columns": {"text": TEXTS},
    "dataset": Dataset.from_dict({"text": TEXTS}),
    "set": set(TEXTS),
    "bytes": b"The weather today",
    "number": 5,
}


def activations(lm, prompts):
    """One row per token, however the prompts are batched."""
    return [torch.cat([found[HOOK].flatten(0, 1)[:3] for found in lm.stream_activations(prompts, HOOK)])[:3]]


def direction(lm, prompts):
    return [diff_means(lm, prompts, ["Numbers", "of the town"], HOOK).vector]


def effects(lm, prompts):
    sae = TopKSAE(TopKConfig(16, 2, normalize="none"), 32)
    handle = FeatureHandle(sae, 3, HOOK, {"p99": 1.0})
    table = effect_table(lm, [handle], prompts, n_random=2, show=False)
    return [torch.tensor([table.rows[0].rise, table.n_prompts])]


READERS = {"stream_activations": activations, "diff_means": direction, "effect_table": effects}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", TAKEN)
def test_every_reader_takes_the_same_containers(tiny_lm, reader, name):
    given = (text for text in TEXTS) if name == "generator" else TAKEN[name]
    for one, other in zip(READERS[reader](tiny_lm, given), READERS[reader](tiny_lm, TEXTS), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reader", READERS)
def test_one_text_is_one_prompt_and_not_its_letters(tiny_lm, reader):
    for one, other in zip(READERS[reader](tiny_lm, TEXTS[0]), READERS[reader](tiny_lm, TEXTS[:1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_yield_something_else_is_refused(tiny_lm, reader, name):
    with pytest.raises(ValueError, match=f"is a {type(REFUSED[name]).__name__}: give a list of prompts"):
        READERS[reader](tiny_lm, REFUSED[name])


@pytest.mark.parametrize("documents", [TEXTS[0], FRAME, {"text": TEXTS}, Dataset.from_dict({"text": TEXTS}), b"text"])
def test_packing_takes_documents_alone(tiny_lm, documents):
    with pytest.raises(ValueError, match=f"documents is a {type(documents).__name__}: give a list of documents"):
        list(pack(documents, tiny_lm, 16, 2))


def test_one_hook_name_is_one_name():
    config = CrosscoderConfig(16, 2)
    object.__setattr__(config, "hook_names", HOOK)  # the type checks of the tests would refuse it as an argument
    config.__post_init__()
    assert config.hook_names == (HOOK,)
