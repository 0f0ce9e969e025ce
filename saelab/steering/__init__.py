"""Steering: edits that change one feature or add a direction while the model runs; pass them to `lm.steer`."""

from saelab.edits.direction import Direction
from saelab.edits.feature_edit import FeatureEdit
from saelab.edits.feature_handle import FeatureHandle
from saelab.steering.effect_table import NEUTRAL_PROMPTS, EffectTable, effect_table
from saelab.steering.find import find
from saelab.steering.found import Found
from saelab.steering.plan import Plan
from saelab.steering.trials import Trial, run_trials
from saelab.steering.vectors import diff_means

__all__ = [
    "NEUTRAL_PROMPTS",
    "Direction",
    "EffectTable",
    "FeatureEdit",
    "FeatureHandle",
    "Found",
    "Plan",
    "Trial",
    "diff_means",
    "effect_table",
    "find",
    "run_trials",
]
