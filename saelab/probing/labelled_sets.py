"""Labelled texts to probe: the binary sets of the package sae-probes, and one set for each concept of `concepts.parquet`.

sae-probes (Kantamneni et al. 2025, "Are Sparse Autoencoders Useful? A Case Study in Sparse Probing", arXiv 2502.16681) carries
113 binary sets that others made; its wheel is fetched when they are first asked for, and no part of it comes with saelab. Equal
texts count once, so that none is in both halves of a split; texts with both labels are left out.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from saelab.models.wheels import Wheel, cached_folder
from saelab.tokens.sources import open_named

WHEEL = "sae-probes==0.4.2"
WHEEL_SHA256 = "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03"
GROUPS = ("sae-probes", "concepts")
"""What a name may stand for besides one set."""
CONCEPT = "wordnet_"
"""What the names of the concepts' sets begin with."""
_DATA, _INDEX, _LICENSE = "sae_probes/data/", "probing_datasets_MASTER.csv.zst", "LICENSE"
_NOT_NAMED = "source not named there"


class LabelledSet(NamedTuple):
    """Texts with a yes or no each, all texts different."""

    name: str
    origin: str
    """Where the texts are from."""
    positive: str
    """What the label "yes" stands for."""
    texts: tuple[str, ...]
    labels: Bool[np.ndarray, " n_texts"]

    @property
    def fingerprint(self) -> str:
        """A hash of the texts and labels."""
        digest = hashlib.sha256(self.labels.tobytes())
        for text in self.texts:
            digest.update(len(text).to_bytes(4, "big") + text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def labelled_set(
    name: str, origin: str, positive: str, texts: Sequence[str], labels: Sequence[bool], n_texts: int
) -> LabelledSet:
    """At most `n_texts` of the texts, as many of either label, drawn by the name alone; see above for which are left out."""
    told: dict[str, set[bool]] = {}
    for text, label in zip(texts, labels, strict=True):
        if text.strip():
            told.setdefault(text, set()).add(bool(label))
    sides = [[text for text, of in told.items() if of == {label}] for label in (False, True)]
    generator = np.random.default_rng(seed_of(name))
    n = min(n_texts // 2, *map(len, sides))
    kept = [(side[i], label) for label, side in enumerate(sides) for i in sorted(generator.permutation(len(side))[:n])]
    chosen = np.array([bool(label) for _, label in kept], dtype=bool)
    return LabelledSet(name, origin, positive, tuple(text for text, _ in kept), chosen)


def seed_of(*names: object) -> int:
    """A seed that depends on nothing but these names."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "big")


def set_names(asked: Sequence[str] = GROUPS) -> list[str]:
    """The names of the sets that are asked for by name or group, each once. Raises `ValueError` for an unknown name."""
    found: list[str] = []
    for name in asked:
        known = _concepts() if name.startswith(("concepts", CONCEPT)) else _index()
        if name not in known and name not in GROUPS:
            close = difflib.get_close_matches(name, [*_index(), *_concepts()], n=1)
            hint = f"did you mean {close[0]}?" if close else f"give {' or '.join(GROUPS)}, or names of --list-sets."
            raise ValueError(f"{name!r} is no labelled set; {hint}")
        found += [name] if name in known else list(known)
    return list(dict.fromkeys(found))


def load_set(name: str, n_texts: int) -> LabelledSet:
    """The set of this name, out of `set_names()`."""
    (origin,) = set_origins([name]).values()
    if name.startswith(CONCEPT):
        rows = _concept_rows()
        labels = [concept == name.removeprefix(CONCEPT) for _, concept in rows]
        return labelled_set(name, origin, name.removeprefix(CONCEPT), [text for text, _ in rows], labels, n_texts)
    rows = _table(_folder() / _index()[name]["file"], "prompt", "target")
    low, high = sorted({row["target"] for row in rows})
    texts, labels = [row["prompt"] for row in rows], [row["target"] == high for row in rows]
    return labelled_set(name, origin, f"{high} (not {low})", texts, labels, n_texts)


def set_origins(names: Sequence[str]) -> dict[str, str]:
    """Where the sets of these names, out of `set_names()`, are from."""
    wordnet = "concepts.parquet: WordNet 3.0 usage sentences of this class against the other classes"
    return {name: wordnet if name.startswith(CONCEPT) else f"{WHEEL}, {_index()[name]['link']}" for name in names}


def _folder() -> Path:
    """Where the sets of sae-probes are kept."""
    wheel = Wheel(WHEEL, WHEEL_SHA256, 45, "The labelled sets of sae-probes")
    advice = "Set SAELAB_CACHE to a writable folder with 100 MB free, or probe `concepts` alone"
    return cached_folder("sae-probes-0.4.2", wheel, _extract, advice)


def _extract(wheel: Path, work: Path) -> Path:
    made = work / "sets"
    made.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(f"{_DATA}cleaned_data/") or name == f"{_DATA}{_INDEX}" or name.endswith(f"/{_LICENSE}"):
                with archive.open(name) as source, (made / Path(name).name).open("wb") as file:
                    shutil.copyfileobj(source, file)
    wheel.unlink()
    return made


@functools.cache
def _index() -> dict[str, dict[str, str]]:
    """File and source of each binary set by its name. The list names the source of a group of sets once."""
    columns = ("Dataset name", "Dataset Tag", "Dataset save name", "Link", "Data type")
    found: dict[str, dict[str, str]] = {}
    links: dict[str, str] = {}
    last = ""
    for row in _table(_folder() / _INDEX, *columns):
        name, tag, saved, link, kind = (row[column] for column in columns)
        of = max((known for known in links if tag.startswith(f"{known}_")), key=len, default="")
        if not link.startswith("http"):
            link = last if link == "^" or not name else links.get(of, _NOT_NAMED)
        last = link
        if tag:
            links[tag] = link
        if kind == "Binary Classification":
            found[tag.replace(" ", "_")] = {"file": f"{Path(saved).name}.zst", "link": link}
    return found


def _concepts() -> list[str]:
    return [f"{CONCEPT}{concept}" for concept in sorted({concept for _, concept in _concept_rows()})]


@functools.cache
def _concept_rows() -> list[tuple[str, str]]:
    """Texts of `concepts.parquet` and their concepts."""
    rows = open_named("concepts", "text").rows(["text", "concept"])
    return [(str(row["text"]), str(row["concept"])) for row in rows]


def _table(path: Path, *columns: str) -> list[dict[str, str]]:
    """Columns of a zstd-compressed CSV file, as text."""
    import pyarrow
    from pyarrow import csv

    with pyarrow.OSFile(str(path)) as raw, pyarrow.CompressedInputStream(raw, "zstd") as file:
        table = csv.read_csv(
            file,
            csv.ReadOptions(block_size=1 << 24),
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pyarrow.string()),
                include_columns=list(columns),
                strings_can_be_null=False,
            ),
        )
    return table.to_pylist()
