"""Probing: whether an SAE's features tell labelled texts apart better than the activations that it reads."""

from saelab.probing.config import ProbeConfig
from saelab.probing.labelled_sets import LabelledSet, labelled_set, load_set, set_names
from saelab.probing.letter_report import LetterReport
from saelab.probing.letters import LetterConfig, first_letters
from saelab.probing.report import ProbeReport
from saelab.probing.running import probe_sets

__all__ = [
    "LabelledSet",
    "LetterConfig",
    "LetterReport",
    "ProbeConfig",
    "ProbeReport",
    "first_letters",
    "labelled_set",
    "load_set",
    "probe_sets",
    "set_names",
]
