"""The kinds of jobs. Each has arguments and three methods: `check` raises `ValueError` for an argument and `SaelabError` where
the RUN lacks something, `python` is the same call, and `run` does it and returns in a line what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from saelab.errors import SaelabError, StoreError
from saelab.features.schema import MANIFEST
from saelab.files import read_json
from saelab.runs import SaeRun
from saelab.validation import check_integer

MAX_TEXT = 300
_MAX_FEATURES = 1000


@dataclass(frozen=True)
class Verify:
    """Check a feature store: every byte, the numbers of all features, and `n_examples` examples, computed again."""

    n_examples: int = 100
    name: ClassVar[str] = "verify"
    title: ClassVar[str] = "Verify"
    changes_store: ClassVar[bool] = False

    def check(self, sae: SaeRun) -> None:
        check_integer("n_examples", self.n_examples, 1, 100_000)
        _check_store(sae)

    def python(self, sae: SaeRun) -> str:
        store = f"store = saelab.load_features({str(sae.features_dir)!r})"
        return f"import saelab\n\n{store}\nstore.verify({_models(sae)}, n_examples={self.n_examples})"

    def run(self, sae: SaeRun) -> str:
        from saelab.features.store import load_features
        from saelab.run_folder.opening import with_model

        opened, lm = with_model(sae.sae_dir)
        found = load_features(sae.features_dir, opened).verify(lm, self.n_examples)
        return f"The store holds: {found}"


@dataclass(frozen=True)
class Collect:
    """Collect the features: of more tokens than before, or, with `renew`, from the beginning. `n_tokens` None: of all."""

    n_tokens: int | None = None
    renew: bool = False
    name: ClassVar[str] = "features"
    title: ClassVar[str] = "Collect features"
    changes_store: ClassVar[bool] = True

    def check(self, sae: SaeRun) -> None:
        if self.n_tokens is not None:
            check_integer("n_tokens", self.n_tokens, 1, 10**12)
        if not isinstance(self.renew, bool):
            raise ValueError(f"renew={self.renew!r} must be True or False.")
        if not (sae.sae_dir / "sae.json").exists():
            raise SaelabError(f"{sae.name} is still being trained: collect its features once training has ended.")

    def python(self, sae: SaeRun) -> str:
        n_tokens = "" if self.n_tokens is None else f", n_tokens={self.n_tokens:_}"
        return (
            f"import saelab\n\nsae = saelab.load_sae({str(sae.sae_dir)!r})\n"
            f"saelab.collect_features(sae, {_models(sae)}, out_dir={str(sae.features_dir)!r}{n_tokens}"
            f"{', renew=True' if self.renew else ''})"
        )

    def run(self, sae: SaeRun) -> str:
        from saelab.features import collect_features
        from saelab.run_folder.opening import with_model

        opened, lm = with_model(sae.sae_dir)
        store = collect_features(opened, lm, out_dir=sae.features_dir, n_tokens=self.n_tokens, renew=self.renew)
        return f"The store has {store.d_sae:,} features, counted on {store.n_tokens:,} tokens."


@dataclass(frozen=True)
class Label:
    """Label features by a server of OpenAI's protocol at `address`, or without one by a model loaded here, and score the
    labels."""

    address: str = ""
    model: str = ""
    n_features: int = 100
    feature: tuple[int, ...] = ()
    """Which; none: the sharpest that fired."""
    name: ClassVar[str] = "label"
    title: ClassVar[str] = "Label features"
    changes_store: ClassVar[bool] = False

    def check(self, sae: SaeRun) -> None:
        check_integer("n_features", self.n_features, 1, 10**6)
        if not isinstance(self.feature, tuple) or len(self.feature) > _MAX_FEATURES:
            raise ValueError(
                f"feature holds {len(self.feature):,} features; give a tuple of at most {_MAX_FEATURES:,}."
            )
        for one in self.feature:
            check_integer("feature", one, 0)
        _check_text("model", self.model)
        if not self.model:
            meant = "the model's name at that address" if self.address else "a model to load here, such as smollm2"
            raise ValueError(f"model is empty: give {meant}.")
        if self.address:
            check_address(self.address)
        _check_store(sae)

    def python(self, sae: SaeRun) -> str:
        explainer, made = "LocalModel", f"LocalModel(saelab.load_model({self.model!r}))"
        if self.address:
            explainer, made = "Endpoint", f"Endpoint({self.address!r}, {self.model!r})"
        chosen = list(self.feature) or 'store.features("sharpness", True, {"n_fired": (1, None)})'
        return (
            f"import saelab\nfrom saelab.labels import {explainer}, label_features\n\n"
            f"store = saelab.load_features({str(sae.features_dir)!r})\nchosen = {chosen}\n"
            f"label_features(store, {made}, chosen[:{self.n_features}])"
        )

    def run(self, sae: SaeRun) -> str:
        from saelab.features.store import load_features
        from saelab.labels import Endpoint, LocalModel, label_features
        from saelab.labels.labelling_run import said

        store = load_features(sae.features_dir)
        if self.address:
            explainer = Endpoint(self.address, self.model)
        else:
            from saelab.models import load_model

            explainer = LocalModel(load_model(self.model))
        chosen = list(self.feature) or store.features("sharpness", True, {"n_fired": (1, None)})
        counts = label_features(store, explainer, chosen[: self.n_features])
        return f"Labels and scores are in {store.annotations.path.name}: {said(counts)}."


Kind = Verify | Collect | Label
KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Verify, Collect, Label)}


def from_arguments(name: str, arguments: Mapping[str, Any]) -> Kind:
    """The kind of this name with arguments as JSON holds them. Raises `ValueError` for an unknown kind or argument."""
    if name not in KINDS:
        raise ValueError(f"kind={name!r} is unknown; expected one of {', '.join(KINDS)}.")
    known: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()
    }
    try:
        return KINDS[name](**known)
    except TypeError as error:
        raise ValueError(f"arguments={dict(arguments)!r} do not fit {name} ({error}).") from error


def command(kind: Kind, sae: SaeRun) -> str:
    """The same as a command."""
    return shlex.join(["saelab", kind.name, str(sae.sae_dir), *_flags(kind)])


def check_address(address: str) -> None:
    """Raise `ValueError` unless this is an http or https address without a name, key or anything else behind its path, as it is
    recorded with the job."""
    _check_text("address", address)
    try:
        found = urlsplit(address)
        fits = found.scheme in ("http", "https") and bool(found.hostname) and (found.port or 1) > 0
    except ValueError:
        raise ValueError(f"address={address!r} is no address; write it as http://127.0.0.1:8000/v1.") from None
    if not fits:
        raise ValueError(f"address={address!r} must begin with http:// or https://, as http://127.0.0.1:8000/v1.")
    if found.username or found.password or found.query or found.fragment:
        raise ValueError("address must hold no key or password: set OPENAI_API_KEY where the dashboard is started.")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable() or value != value.strip():
        raise ValueError(f"{name} must be one line of at most {MAX_TEXT} characters, without spaces around it.")


def _check_store(sae: SaeRun) -> None:
    if not (sae.features_dir / MANIFEST).exists():
        raise StoreError(f"No features have been collected for {sae.name} yet: collect them first.")


def _flags(kind: Any) -> list[str]:
    """What differs from the defaults, as flags of the command."""
    words: list[str] = []
    for name, value in asdict(kind).items():
        if name != "n_features" and value == getattr(type(kind), name):
            continue
        values = [] if value is True else [str(one) for one in value] if isinstance(value, tuple) else [str(value)]
        words += [f"--{name.replace('_', '-')}", *values]
    return words


def _models(sae: SaeRun) -> str:
    """The language models of an SAE, as Python loads them."""
    config = read_json(sae.sae_dir / "sae.json")
    known = config.get("models") or {"": config.get("model") or {}}
    calls = [f"saelab.load_model({one.get('name')!r})" for one in known.values()]
    return calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"
