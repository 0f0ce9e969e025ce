"""Language models: loading one, reading its activations, editing them, generating text."""

from saelab.models.language_model import LanguageModel
from saelab.models.loading import load_model
from saelab.models.steered import Edit, Steering

__all__ = ["Edit", "LanguageModel", "Steering", "load_model"]
