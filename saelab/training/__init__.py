"""Training sparse autoencoders."""

from saelab.training.config import TrainConfig
from saelab.training.loop import train

__all__ = ["TrainConfig", "train"]
