"""`saelab train --preset`: the settings of a paper, where no flag says otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def apply_preset(arguments: Any, args: Sequence[str]) -> None:
    """Set the fields of `arguments.config` and `arguments.train` that its preset sets and no flag of `args` gives. Raises
    `ValueError` for a variant that the preset is not for."""
    from saelab.presets import settings

    config, train = arguments.config, arguments.train
    given = {
        word.lstrip("-").partition("=")[0].replace("_", "-").removeprefix("no-") for word in args if word[:2] == "--"
    }
    found = settings(arguments.preset, arguments.variant, config.d_sae, train.n_tokens, getattr(config, "k", None))
    wanted = {name: value for name, value in found.items() if name.replace("_", "-") not in given}
    arguments.config, arguments.train = (
        dataclasses.replace(one, **{name: wanted[name] for name in wanted if name in one.__dataclass_fields__})
        for one in (config, train)
    )
