"""Feature stores: one pass over held-out tokens collects them; each can then be browsed, rendered as HTML or steered.

Browsing a store does not import torch: what collects is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from saelab.features.end import End
from saelab.features.feature import Feature
from saelab.features.records import Example
from saelab.features.store import FeatureStore, load_features

if TYPE_CHECKING:
    from saelab.features.collecting.collect import collect_features
    from saelab.features.collecting.snapshots import collect_snapshots

__all__ = ["End", "Example", "Feature", "FeatureStore", "collect_features", "collect_snapshots", "load_features"]


def __getattr__(name: str) -> Any:
    if name == "collect_features":
        from saelab.features.collecting.collect import collect_features

        return collect_features
    if name == "collect_snapshots":
        from saelab.features.collecting.snapshots import collect_snapshots

        return collect_snapshots
    raise AttributeError(f"module 'saelab.features' has no attribute {name!r}; it has {', '.join(__all__)}")
