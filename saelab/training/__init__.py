"""Training sparse autoencoders."""

from saelab.training.config import TrainConfig
from saelab.training.finetune import finetune
from saelab.training.loop import train

__all__ = ["TrainConfig", "finetune", "train"]
