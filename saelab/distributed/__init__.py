"""Several processes that train together: how they join, and what they tell each other. Knows no SAE and no files."""

from saelab.distributed.launch import is_first, join
from saelab.distributed.ranks import ALONE, Ranks

__all__ = ["ALONE", "Ranks", "is_first", "join"]
