"""Language models: loading one, reading its activations, editing them, generating text."""

from saelab.models.hooks import Edit
from saelab.models.language_model import LanguageModel
from saelab.models.loading import load_model

__all__ = ["Edit", "LanguageModel", "load_model"]
