"""The house speaks one vocabulary: no identifier is a word that CONTRIBUTING's table replaces, or is built from one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from for_each import for_each
from test_layout import ROOT, SOURCES, TREES

REPLACED = {
    "acts": "activations, or feature_acts",
    "codes": "feature_acts",
    "site": "hook",
    "sites": "hooks, or hook_places",
    "sequence": "context",
    "sequences": "contexts",
    "pool": "shuffle buffer",
    "places": "capacity, positions, or hook_places",
    "slack": "error_bound",
    "doubtful": "uncertified",
    "anew": "again",
    "upkeep": "dead-code revival",
    "rotated": "rotation_trick",
    "limits": "calibration, or max_norms",
    "admit": "add",
    "own": "local",
    "whole": "global, or full",
    "agree": "any_rank",
    "alone": "SINGLE_PROCESS",
    "written": "decoder, or outputs",
    "reads": "inputs",
    "writes": "outputs",
    "rule": "selection_rule",
    "parts": "micro_batches",
    "bag": "spmm",
}
"""Words, and what to say."""
NAMES = {
    "true_places": "flatnonzero",
    "ascending": "sort",
    "stable_order": "stable_argsort",
    "sampled_product": "sddmm",
    "bag_sum": "spmm",
    "weight_gradients": "spmm_transposed",
    "gather_alike": "all_gather",
    "take_from_first_": "broadcast_",
    "take_gpu": "set_local_device",
    "is_first": "is_main_process",
    "train_on": "train_step",
    "_learn": "_forward_backward",
    "pass_through": "straight_through",
    "shares_batches": "supports_data_parallel",
    "shape_names": "extra_dims",
    "stand_ins": "replacement_rows",
    "FALL": "RAMP_FRACTION",
    "SETTLE": "ANNEAL_FRACTION",
    "MEMORY": "EMA_DECAY",
    "REACH": "INTEGRAL_LIMITS",
}
"""Whole names, and what to say."""
TERMS = r"(pre|sparse|dead|feature|selected)_?acts|feature_acts_of|check_feature_acts"
"""The field's terms that contain a word of the table."""
ANOTHER_SENSE = {
    # identifier: why it stays
    "hook_places": "modules and sides (`HookPlace`), not capacity",
    "hf_hook_places": "as hook_places",
    "bridge_hook_places": "as hook_places",
    "_hook_places_of": "as hook_places",
    "whole_numbers": "integers",
    "writes_to_residual": "a hook's, not an SAE's",
    "_WRITES_TO_RESIDUAL": "as writes_to_residual",
    "_tokens_written": "on disk",
    "INTEGRAL_LIMITS": "of the controller",
    "_LIMITS": "of the dashboard's inputs",
    "selection_rule": "the word to say",
    "NORM_RULE_FACTOR": "a rule of the mask",
    "NORM_RULE_ROWS": "a rule of the mask",
    "NormRule": "a rule of the mask",
    "norm_rule": "a rule of the mask",
    "_norm_rule": "a rule of the mask",
    "mask_rule": "a rule of the mask",
    "MASK_RULE": "a rule of the mask",
    "OwnModel": "the caller's own",
    "OwnTexts": "the caller's own",
    "own_texts": "the texts of an SAE",
    "own_ratios": "a crosscoder's",
    "along_own": "as own_ratios",
    "_OWN": "keys or signals of this module",
    "Sequence": "typing's",
    "SequenceMatcher": "difflib's",
    "ThreadPoolExecutor": "Python's",
    "_embedding_bag_per_sample_weights_backward": "torch's",
    "embedding_bag": "torch's",
    "resident_parts": "of a matrix in the cache",
    "n_parts": "as resident_parts",
    "doc_parts": "arrays to concatenate",
    "ids_parts": "arrays to concatenate",
}
PUBLIC_OR_ON_DISK = {
    "acts": {
        "SAEOutput": "saelab/saes/step.py",
        "read": r"saelab/(benchmarks/synthetic|evaluation/(reconstruction|report)|io)\.py",
    },
    "sequence": {
        "Example": r"saelab/features/(reader|records|verify|measuring)\.py",
    },
    "num_return_sequences": {"transformers' name": r"saelab/models/generation\.py"},
    "pool_shards": {"harvest": r"activation_cache/.*"},
    "js_own": {"a column": r"saelab/benchmarks/.*"},
}
CODEBOOKS = r"saelab/(saes/codebook/.*|benchmarks/fsm\.py)|kernels/bench/peer_worker\.py"
"""Where codes are meant: codebook entries, and another library's argument."""
STRINGS = (
    r"app/.*|kernels/.*|activation_cache/reader\.py|saelab/(cli|models|tokens)/.*"
    r"|saelab/(benchmarks/svg|features/(collect|render)|evaluation/report)\.py"
)
"""Where `parts` are parts of a text, a table or a matrix."""


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every name that the file defines or uses: modules aside, classes, functions, arguments, attributes."""
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.keyword):
            name = None  # the definition is looked at
        if isinstance(name, str):
            yield getattr(node, "lineno", 0), name


def words(name: str) -> list[str]:
    """`HookPlaces` and `hook_places` are both hook, places."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_").split("_")


def offence(file: str, name: str) -> str:
    """What to say instead of a name; "" where it is fine."""
    if name in NAMES:
        return NAMES[name]
    if name in ANOTHER_SENSE or re.search(TERMS, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()):
        return ""
    if any(re.fullmatch(where, file) for where in PUBLIC_OR_ON_DISK.get(name, {}).values()):
        return ""
    for word in words(name):
        if word == "codes" and re.fullmatch(CODEBOOKS, file) or word == "parts" and re.fullmatch(STRINGS, file):
            continue
        if word in REPLACED:
            return REPLACED[word]
    return ""


@for_each(SOURCES)
def test_one_vocabulary(file: str):
    module = file.rpartition("/")[2].removesuffix(".py")
    found = [(1, module), *identifiers(TREES[file])]
    wrong = [f"{file}:{line}: {name}: say {said}" for line, name in found if (said := offence(file, name))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("site", "hook"),
        ("hf_sites", "hooks"),
        ("SitesUsed", "hooks"),
        ("own_rows", "local"),
        ("true_places", "flatnonzero"),
    ],
)
def test_a_replaced_word_is_found(name: str, said: str):
    assert said in offence("saelab/training/loop.py", name)


def test_the_table_of_contributing_names_them_all():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for word in REPLACED.keys() | NAMES.keys():
        assert re.search(rf"\b{word}\b", table), word
