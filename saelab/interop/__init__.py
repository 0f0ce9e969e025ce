"""Reading SAEs: saelab's own folders; a foreign format gets a file of its own here when it is built."""

from saelab.io import load_sae

__all__ = ["load_sae"]
