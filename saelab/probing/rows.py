"""The activations of labelled texts at their last token, kept on disk set by set, so that probing them takes no model.

Of a longer text the last `max_tokens` tokens are read, since its end is what the last token stands for. The file
`FOLDER/HASH/SET.safetensors` appears atomically; HASH is that of the model, the hooks and the sizes, so that SAEs on one hook
share their rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.files import atomic_save_safetensors
from saelab.models import LanguageModel
from saelab.probing.labelled_sets import LabelledSet, load_set
from saelab.tokens.sources import without_lone_surrogates
from saelab.tokens.tokenizing import check_tokenizer

BATCH_TOKENS = 4096
MIN_TEXTS = 32
"""Of either label: a set with fewer is left out."""
_VERSION = 1


class Rows(NamedTuple):
    """A labelled set as the model read it."""

    name: str
    origin: str
    positive: str
    fingerprint: str
    y: Bool[np.ndarray, " n"]
    x: Float[Tensor, "n *sources d_in"]
    """At the last token."""
    tokens: list[np.ndarray]
    """The ids that were read, without what every context begins with."""


class Harvest:
    """Reads sets with `lm` at `hooks`, each text behind the ids `start`, and keeps the rows in `folder`."""

    def __init__(
        self,
        lm: LanguageModel,
        hooks: Sequence[str],
        folder: Path,
        *,
        start: Sequence[int] = (),
        n_texts: int,
        max_tokens: int,
    ) -> None:
        self.lm, self.hooks, self.start, self.n_texts = lm, list(hooks), list(start), n_texts
        self.max_tokens = min(max_tokens, lm.max_ctx)
        self.settings: dict[str, Any] = {
            "saelab_probing_rows": _VERSION,
            "model": [lm.hash, str(lm.dtype).removeprefix("torch."), lm.config_hash, lm.tokenizer_hash],
            "hooks": self.hooks,
            "start": self.start,
            "n_texts": n_texts,
            "max_tokens": self.max_tokens,
        }
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:12]

    def collect(self, sets: Sequence[str | LabelledSet], progress: bool = True) -> list[Rows]:
        """The rows of the sets, given by name or as they are; what is not in `folder` yet is read. Those with fewer than
        `MIN_TEXTS` texts of either label are left out."""
        found = []
        with tqdm(sets, desc="Harvest", unit="set", disable=not progress) as bar:
            for one in bar:
                labelled = load_set(one, self.n_texts) if isinstance(one, str) else one
                bar.set_postfix_str(labelled.name[:40], refresh=False)
                if min(labelled.labels.sum(), (~labelled.labels).sum()) >= MIN_TEXTS:
                    found.append(self.rows(labelled))
        return found

    def rows(self, labelled: LabelledSet) -> Rows:
        """The rows of one set, read from disk if they are there."""
        path = self.folder / f"{labelled.name}.safetensors"
        if path.exists() and (kept := _read(path, labelled)) is not None:
            return kept
        ids = self._ids(labelled.texts)
        kept_texts = [i for i, row in enumerate(ids) if len(row) > 1]  # the first token of a context reads nothing
        ids = [ids[i] for i in kept_texts]
        tensors = {
            "x": self._last(ids),
            "y": torch.from_numpy(labelled.labels[kept_texts]),
            "tokens": torch.tensor([one for row in ids for one in row[len(self.start) :]], dtype=torch.int32),
            "lengths": torch.tensor([len(row) - len(self.start) for row in ids], dtype=torch.int32),
        }
        atomic_save_safetensors(
            path, tensors, {"fingerprint": labelled.fingerprint, "settings": json.dumps(self.settings)}
        )
        return _opened(tensors, labelled)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """What is read of each text."""
        check_tokenizer(self.lm.tokenizer)
        bare = self.lm.tokenizer([without_lone_surrogates(text) for text in texts], add_special_tokens=False)
        return [self.start + list(ids)[-(self.max_tokens - len(self.start)) :] for ids in bare["input_ids"]]

    def _last(self, ids: Sequence[list[int]]) -> Float[Tensor, "n *sources d_in"]:
        """Activations at the last token of each row of ids, on the CPU."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        batches = _batches([ids[i] for i in order])
        stream = self.lm.stream_activations(batches, self.hooks)
        found: dict[str, list[Tensor]] = {name: [] for name in self.hooks}
        for batch, here in zip(batches, stream, strict=True):
            ends = torch.tensor([len(row) - 1 for row in batch])
            for name in self.hooks:
                found[name].append(here[name].cpu()[torch.arange(len(batch)), ends])
        back = torch.tensor(np.argsort(order))
        x = [torch.cat(found[name])[back] for name in self.hooks]
        if not all(bool(one.isfinite().all()) for one in x):
            raise SaelabError(
                f"{self.lm.name} computed NaN or infinite activations at {', '.join(self.hooks)}: try --dtype float32."
            )
        return x[0] if len(x) == 1 else torch.stack(x, dim=1)


def _batches(ids: Sequence[list[int]]) -> list[list[list[int]]]:
    """Rows of ascending length in batches of at most `BATCH_TOKENS` tokens, padding included."""
    batches: list[list[list[int]]] = [[]]
    for row in ids:
        if batches[-1] and (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _read(path: Path, labelled: LabelledSet) -> Rows | None:
    """The rows in a file; None if they are of other texts or labels. Raises `SaelabError` for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != labelled.fingerprint:
                return None
            return _opened({name: file.get_tensor(name) for name in ("x", "y", "tokens", "lengths")}, labelled)
    except Exception as error:
        raise SaelabError(f"{path} is damaged ({error}): remove it, and repeat the same call.") from error


def _opened(tensors: Mapping[str, Tensor], labelled: LabelledSet) -> Rows:
    ends = tensors["lengths"].cumsum(0).tolist()[:-1]
    tokens = np.split(tensors["tokens"].numpy(), ends)
    about = (labelled.name, labelled.origin, labelled.positive, labelled.fingerprint)
    return Rows(*about, tensors["y"].numpy(), tensors["x"], tokens)
