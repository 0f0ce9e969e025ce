"""Labels of features by a language model, and scores that say how far such a label holds.

Nothing is sent anywhere unless an address is given: `label_features(store, Endpoint("http://127.0.0.1:8000/v1", "a-model"))`.
"""

from saelab.labels.explainers import Endpoint, LocalModel
from saelab.labels.labelling_run import label_features

__all__ = ["Endpoint", "LocalModel", "label_features"]
