"""Several processes that train together: how they join, and what they tell each other. Knows no SAE and no files."""

from saelab.distributed.collectives import ALONE, Ranks
from saelab.distributed.launch import apart, is_first, join, place, take_gpu

__all__ = ["ALONE", "Ranks", "apart", "is_first", "join", "place", "take_gpu"]
