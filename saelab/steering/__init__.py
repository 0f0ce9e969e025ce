"""Steering: edits that change one feature or add a direction while the model runs; pass them to `lm.steer`."""

from saelab.edits.direction import Direction
from saelab.edits.feature_edit import FeatureEdit
from saelab.edits.feature_handle import FeatureHandle
from saelab.steering.compare import compare
from saelab.steering.comparison import Comparison
from saelab.steering.effect_table import NEUTRAL_PROMPTS, EffectTable, effect_table
from saelab.steering.plan import Plan
from saelab.steering.vectors import diff_means

__all__ = [
    "NEUTRAL_PROMPTS",
    "Comparison",
    "Direction",
    "EffectTable",
    "FeatureEdit",
    "FeatureHandle",
    "Plan",
    "compare",
    "diff_means",
    "effect_table",
]
