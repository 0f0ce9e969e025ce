"""saelab: a workbench for sparse autoencoders. The public names, imported when first used."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import version

    from saelab import saes, steering
    from saelab.activation_cache.harvest import harvest
    from saelab.evaluation import evaluate
    from saelab.features import collect_features, load_features
    from saelab.interop import load_sae, save_sae
    from saelab.models import load_model
    from saelab.saes import VARIANTS
    from saelab.tokens import load_texts
    from saelab.training import TrainConfig, finetune, train

    __version__ = version("saelab")

__all__ = [
    "VARIANTS",
    "TrainConfig",
    "__version__",
    "collect_features",
    "evaluate",
    "finetune",
    "harvest",
    "load_features",
    "load_model",
    "load_sae",
    "load_texts",
    "saes",
    "save_sae",
    "steering",
    "train",
]

# A thread of torch's OpenMP that waits for the others spins for a millisecond or so before it sleeps. Beside another process that
# is busy, it spins away the time of the thread that it waits for. Read once, when torch is loaded; what the user set stands.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Where each name lives; None: the name is a module itself.
_HOMES = {
    "VARIANTS": "saelab.saes",
    "TrainConfig": "saelab.training",
    "collect_features": "saelab.features",
    "evaluate": "saelab.evaluation",
    "finetune": "saelab.training",
    "harvest": "saelab.activation_cache.harvest",
    "load_features": "saelab.features",
    "load_model": "saelab.models",
    "load_sae": "saelab.interop",
    "load_texts": "saelab.tokens",
    "saes": None,
    "save_sae": "saelab.interop",
    "steering": None,
    "train": "saelab.training",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("saelab")
    elif name not in _HOMES:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    else:
        home = _HOMES[name]
        value = import_module(f"saelab.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
