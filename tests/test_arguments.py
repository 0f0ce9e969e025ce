"""Whole numbers are checked where they are given; in a bare process for callers, as the tests check types before them."""

import subprocess
import sys

import pytest

from saelab.arguments import check_integer


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (2e3, r"n=2000\.0 must be a whole number, an int: write 2000\."),
        (1.5, r"n=1\.5 must be a whole number, an int\."),
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


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("FeatureChoiceConfig(16, 4, budget='even')", "budget='even' must be one of 'zipf', 'uniform'."),
        ("TopKConfig(16, 4, aux=None)", "aux=None must be one of 'auxk', 'aux_zipf'."),
        ("MatryoshkaConfig(16, 4, group_fractions=('a', 0.5))", "group_fractions=('a', 0.5) must be numbers."),
    ],
)
def test_choices_and_tuples_of_numbers_are_checked(call, says):
    run = subprocess.run([sys.executable, "-c", f"import saelab; saelab.saes.{call}"], capture_output=True, text=True)
    assert f"ValueError: {says}" in run.stderr


@pytest.mark.parametrize(
    "call",
    [
        "saelab.TrainConfig(n_tokens=2e3, batch_size=256)",
        "saelab.TrainConfig(n_tokens=2000, batch_size=256, seed=0.5)",
        "saelab.saes.TopKConfig(d_sae=48, k=4.0)",
        "saelab.saes.TopKConfig(d_sae=48.7, k=4)",
        "saelab.saes.ReLUConfig(d_sae='48')",
    ],
)
def test_callers_check_theirs(call):
    run = subprocess.run([sys.executable, "-c", f"import saelab; {call}"], capture_output=True, text=True)
    assert "ValueError: " in run.stderr and "must be a whole number" in run.stderr


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("saelab.TrainConfig(n_tokens=2000, batch_size=256, lr='1e-3')", "lr='1e-3' must be a number."),
        ("saelab.TrainConfig(n_tokens=2000, batch_size=256, clip_norm=None)", "clip_norm=None must be a number."),
        (
            "saelab.TrainConfig(n_tokens=2000, batch_size=256, decay_fraction=float('nan'))",
            "decay_fraction=nan must be",
        ),
        ("saelab.saes.TopKConfig(d_sae=48, k=4, auxk_alpha='a')", "auxk_alpha='a' must be a number."),
        ("saelab.saes.ReLUConfig(d_sae=48, l1_coefficient=True)", "l1_coefficient=True must be a number."),
    ],
)
def test_fields_that_are_numbers_hold_numbers(call, says):
    run = subprocess.run([sys.executable, "-c", f"import saelab; {call}"], capture_output=True, text=True)
    assert f"ValueError: {says}" in run.stderr
