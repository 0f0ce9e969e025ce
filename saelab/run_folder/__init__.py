"""What a RUN folder tells: what each SAE is and scored, how its training goes, and the SAE with its models. Imports no torch."""

from saelab.run_folder.curves import training
from saelab.run_folder.summary import summary

__all__ = ["summary", "training"]
