"""Codebook features: an SAE variant on cached activations, and codebooks inside a model that is finetuned with them."""

from saelab.saes.codebook.checkpoint import load, save
from saelab.saes.codebook.config import CodebookConfig
from saelab.saes.codebook.edits import CodeEdit, CodeMatch, find_codes
from saelab.saes.codebook.finetune import finetune
from saelab.saes.codebook.insertion import Inserted, insert
from saelab.saes.codebook.sae import CodebookSAE

__all__ = [
    "CodeEdit",
    "CodeMatch",
    "CodebookConfig",
    "CodebookSAE",
    "Inserted",
    "find_codes",
    "finetune",
    "insert",
    "load",
    "save",
]
