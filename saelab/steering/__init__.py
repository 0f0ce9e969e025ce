"""Steering: edits that change one feature or add a direction while the model runs; pass them to `lm.steer`."""

from saelab.edits.direction import Direction
from saelab.edits.feature_edit import FeatureEdit
from saelab.edits.feature_handle import FeatureHandle
from saelab.steering.affine_maps import AffineEdit, LinEAS
from saelab.steering.attenuate import Attenuation, attenuate
from saelab.steering.compare import compare
from saelab.steering.comparison import Comparison
from saelab.steering.concept_bench import Concept, concept_bench
from saelab.steering.concept_features import ConceptFeature, features_for
from saelab.steering.concept_separability import ConceptSeparability, concept_separability
from saelab.steering.effect_table import NEUTRAL_PROMPTS, EffectTable, effect_table
from saelab.steering.find import find
from saelab.steering.found import Found
from saelab.steering.judges import ModelJudge
from saelab.steering.lineas import lineas
from saelab.steering.plan import Plan
from saelab.steering.probe import Probe, probe
from saelab.steering.report import steering_report
from saelab.steering.report_shown import SteeringReport
from saelab.steering.reported import ReportRow
from saelab.steering.trials import Trial, run_trials
from saelab.steering.vectors import diff_means, pca_pairs

__all__ = [
    "NEUTRAL_PROMPTS",
    "AffineEdit",
    "Attenuation",
    "Concept",
    "ConceptFeature",
    "ConceptSeparability",
    "Comparison",
    "Direction",
    "EffectTable",
    "FeatureEdit",
    "FeatureHandle",
    "Found",
    "Plan",
    "LinEAS",
    "ModelJudge",
    "Probe",
    "ReportRow",
    "SteeringReport",
    "Trial",
    "attenuate",
    "compare",
    "concept_bench",
    "concept_separability",
    "diff_means",
    "effect_table",
    "features_for",
    "find",
    "lineas",
    "pca_pairs",
    "probe",
    "run_trials",
    "steering_report",
]
