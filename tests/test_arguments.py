"""Numbers, choices and flags are checked where they are given; in a bare process for callers, as the tests check types before
them."""

import json
import subprocess
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest

from saelab.benchmarks.family import FamilyConfig
from saelab.benchmarks.large import LargeConfig
from saelab.benchmarks.sweep import SweepConfig
from saelab.probing import ProbeConfig
from saelab.probing.letters import LetterConfig
from saelab.saes import VARIANTS
from saelab.training import TrainConfig
from saelab.validation import check_integer


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (2e3, r"n=2000\.0 must be a whole number, of type int: write 2000\."),
        (1.5, r"n=1\.5 must be a whole number, of type int\."),
        ("5", "n='5' must be a whole number"),
        (True, "n=True must be a whole number"),
        (None, "n=None must be a whole number"),
        (0, "n=0 must be between 1 and 9"),
        (10, "n=10 must be between 1 and 9"),
    ],
)
def test_what_is_no_integer_in_its_bounds_is_named(value, says):
    with pytest.raises(ValueError, match=says):
        check_integer("n", value, 1, 9)


WHOLE = "must be a whole number"
CALLS = {
    # choices and tuples of numbers
    "saelab.saes.FeatureChoiceConfig(16, 4, budget='even')": "budget='even' must be one of 'zipf', 'uniform'.",
    "saelab.saes.TopKConfig(16, 4, aux=None)": "aux=None must be one of 'auxk', 'aux_zipf'.",
    "saelab.saes.MatryoshkaConfig(16, 4, group_fractions=('a', 0.5))": "group_fractions=('a', 0.5) must be numbers.",
    # whole numbers
    "saelab.TrainConfig(n_tokens=2e3, batch_size=256)": f"n_tokens=2000.0 {WHOLE}",
    "saelab.TrainConfig(n_tokens=2000, batch_size=256, seed=0.5)": f"seed=0.5 {WHOLE}",
    "saelab.saes.TopKConfig(d_sae=48, k=4.0)": f"k=4.0 {WHOLE}",
    "saelab.saes.TopKConfig(d_sae=48.7, k=4)": f"d_sae=48.7 {WHOLE}",
    "saelab.saes.ReLUConfig(d_sae='48')": f"d_sae='48' {WHOLE}",
    "saelab.benchmarks.family.FamilyConfig(eval_tokens=0)": "eval_tokens=0 must be at least 1",
    "saelab.benchmarks.sweep.SweepConfig(2000, eval_tokens_ce=-1)": "eval_tokens_ce=-1 must not be negative",
    "saelab.benchmarks.large.LargeConfig(k=0)": "k=0 must be at least 1",
    "saelab.probing.letters.LetterConfig(max_k=0)": "max_k=0 must be at least 1",
    # numbers
    "saelab.TrainConfig(n_tokens=2000, batch_size=256, lr='1e-3')": "lr='1e-3' must be a number.",
    "saelab.TrainConfig(n_tokens=2000, batch_size=256, clip_norm=None)": "clip_norm=None must be a number.",
    "saelab.TrainConfig(n_tokens=2000, batch_size=256, decay_fraction=float('nan'))": "decay_fraction=nan must be",
    "saelab.saes.TopKConfig(d_sae=48, k=4, auxk_alpha='a')": "auxk_alpha='a' must be a number.",
    "saelab.saes.ReLUConfig(d_sae=48, l1_coefficient=True)": "l1_coefficient=True must be a number.",
}
BARE = """
import json, sys, saelab, saelab.benchmarks.family, saelab.benchmarks.large, saelab.benchmarks.sweep, saelab.probing.letters
said = []
for call in json.load(sys.stdin):
    try:
        eval(call)
    except ValueError as error:
        said.append(str(error))
    except Exception as error:
        said.append(repr(error))
    else:
        said.append("no error")
print(json.dumps(said))
"""

BAD = {
    bool: ["'yes'", "1", "0.0"],
    int: ["2.5", "True", "'3'"],
    float: ["float('inf')", "-float('inf')", "float('nan')", "1e39", "'0.1'", "False"],
    tuple[float, float]: ["'ab'", "('a', 0.5)", "(float('nan'), 0.5)"],
    tuple[float, ...]: ["(float('inf'), 0.5)", "(1e39,)", "0.5", "('a',)"],
}
CONFIGS = {
    **{f"saelab.saes.{one.Config.__name__}(d_sae=48, ": one.Config for one in VARIANTS.values()},
    "saelab.TrainConfig(n_tokens=2000, batch_size=256, ": TrainConfig,
    "saelab.probing.ProbeConfig(": ProbeConfig,
    "saelab.probing.letters.LetterConfig(": LetterConfig,
    "saelab.benchmarks.family.FamilyConfig(": FamilyConfig,
    "saelab.benchmarks.sweep.SweepConfig(n_tokens=2000, ": SweepConfig,
    "saelab.benchmarks.large.LargeConfig(": LargeConfig,
}


def bad_fields():
    """A call and how its error begins, for each field of each config and each value that is not of the field's kind."""
    for call, config in CONFIGS.items():
        kinds = get_type_hints(config)
        for field in fields(config):
            kind = next((one for one in BAD if kinds[field.name] in (one, one | None)), None)
            for value in [] if f"{field.name}=" in call or kind is None else BAD[kind]:
                if (field.name, value) != ("clip_norm", "float('inf')"):  # turns clipping off
                    yield f"{call}{field.name}={value})", f"{field.name}={eval(value)!r} must be"


CALLS |= dict(bad_fields())


@pytest.fixture(scope="module")
def said():
    """What each call raises where nothing checks types before it."""
    command = [sys.executable, "-c", BARE]
    run = subprocess.run(command, input=json.dumps(list(CALLS)), capture_output=True, text=True, check=True)
    return dict(zip(CALLS, json.loads(run.stdout), strict=True))


def test_callers_check_theirs(said):
    wrong = {call: error for call, error in said.items() if not error.startswith(CALLS[call])}
    assert not wrong


def test_the_table_has_flags_counts_numbers_and_tuples_of_them():
    asked = "\n".join(CALLS)
    for name in (
        "level_aux",
        "per_round",
        "temperature",
        "tau",
        "group_weights",
        "imbalance",
        "tanh_scale",
        "lr",
        "betas",
    ):
        assert f"{name}=" in asked
