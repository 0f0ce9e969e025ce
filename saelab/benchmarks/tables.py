"""Tables of means over seeds, comparisons and plots of benchmark rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saelab.benchmarks.results import Row, spread
from saelab.benchmarks.svg import curves, dot_plot

SYNTHETIC = {
    "mmcs": "MMCS",
    "recovered": "recovered",
    "copies": "copies",
    "fvu": "FVU",
    "l0": "L0",
    "bias": "bias",
    "fvu_batch": "FVU (batch)",
    "l0_batch": "L0 (batch)",
    "dead_fraction": "dead",
    "under_used": "under-used",
    "seconds": "seconds",
}
"""Columns of the main table; columns that only one kind of data has come after them."""
_DRAWN = {"recovered": "recovered share", "fvu": "FVU", "dead_fraction": "dead share"}
FAMILY = {
    "fvu": "FVU",
    "l0": "L0",
    "ce_loss_recovered": "CE recovered",
    "dead_fraction": "dead",
    "tokens_per_second": "tokens/s",
    "wall_seconds": "seconds",
}
L0_TOLERANCE = 0.05
_KEYS = ("data", "sae", "seed", "variant", "target_l0")


def synthetic_tables(rows: Sequence[Row]) -> list[Any]:
    """One rich table per kind of data: mean and standard deviation over the seeds."""
    return [_synthetic_table(kind, [row for row in rows if row["data"] == kind]) for kind in _distinct(rows, "data")]


def _synthetic_table(kind: str, rows: Sequence[Row]) -> Any:
    from rich.table import Table

    numbers = [name for row in rows for name, value in row.items() if name not in _KEYS and not isinstance(value, str)]
    columns = {name: title for name, title in SYNTHETIC.items() if name in numbers}
    columns |= {name: name.replace("_", " ") for name in numbers if name not in columns}
    table = Table("SAE", *columns.values(), title=f"{kind}, {len(_distinct(rows, 'seed'))} seeds")
    for label in _distinct(rows, "sae"):
        mine = [row for row in rows if row["sae"] == label]
        table.add_row(label, *(spread(row.get(name) for row in mine) for name in columns))
    return table


def synthetic_picture(rows: Sequence[Row]) -> str:
    """SVG: recovered fraction, FVU and dead fraction of each SAE on each kind of planted data, one dot per seed."""
    rows = [row for row in rows if "recovered" in row]
    blocks = {
        kind: {
            label: {
                title: [row[name] for row in rows if (row["data"], row["sae"]) == (kind, label)]
                for name, title in _DRAWN.items()
            }
            for label in _distinct([row for row in rows if row["data"] == kind], "sae")
        }
        for kind in _distinct(rows, "data")
    }
    return dot_plot(blocks, tuple(_DRAWN.values()))


def family_tables(rows: Sequence[Row]) -> list[Any]:
    """One rich table for the SAEs, and one per kind with a different target: mean and standard deviation over the seeds."""
    names = _distinct(rows, "table")
    return [_family_table(name, [row for row in rows if row["table"] == name]) for name in names]


def _family_table(name: str, rows: Sequence[Row]) -> Any:
    columns = {"variant": "variant", "target_l0": "target L0"}
    return _measured_table(f"{name}, {len(_distinct(rows, 'seed'))} seeds", columns, rows)


def sweep_table(rows: Sequence[Row]) -> Any:
    """One rich table with a line per SAE, in the order of the rows."""
    columns = {"variant": "variant", "d_sae": "d_sae", "target_l0": "target L0", "lr": "lr", "seed": "seed"}
    return _measured_table(f"{len(rows)} SAEs", columns, rows)


def large_table(rows: Sequence[Row]) -> Any:
    """One rich table: a line per reported number of training tokens, and a last one of held-out measures."""
    from rich.table import Table

    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("variant", "tokens")
    ]
    table = Table("SAE", "tokens", *(name.replace("_", " ") for name in columns), title="Large dictionaries")
    for row in rows:
        at = row["tokens"] if isinstance(row["tokens"], str) else f"{row['tokens']:,}"
        table.add_row(row["variant"], at, *(spread([row.get(name)], 4) for name in columns))
    return table


def _measured_table(title: str, columns: dict[str, str], rows: Sequence[Row]) -> Any:
    """One line for all rows with the same values in `columns` (name: title): mean and standard deviation of each measure."""
    from rich.table import Table

    table = Table(*columns.values(), *FAMILY.values(), title=title)
    for values in dict.fromkeys(tuple(row[name] for name in columns) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in columns) == values]
        labels = {name: "default" if value is None else f"{value}" for name, value in zip(columns, values, strict=True)}
        if not all(row["l0_as_asked"] for row in mine):
            labels["target_l0"] += ", missed by over 5 %"
        cells = [spread((row[name] for row in mine), 0 if "second" in name else 4) for name in FAMILY]
        table.add_row(*labels.values(), *cells)
    return table


def family_picture(rows: Sequence[Row]) -> str:
    """SVG: FVU against held-out L0, one line per variant through its means over the seeds."""
    series: dict[str, list[tuple[float, float]]] = {}
    rows = [row for row in rows if row["table"] == "sae"]
    for variant, level in dict.fromkeys((row["variant"], row["target_l0"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["target_l0"]) == (variant, level)]
        x, y = (sum(row[name] for row in mine) / len(mine) for name in ("l0", "fvu"))
        series.setdefault(variant, []).append((x, y))
    return curves(series, "L0 (active features per held-out token)", "FVU")


def comparisons(rows: Sequence[Row]) -> list[str]:
    """FVU of BatchTopK and AbsTopK against TopK, and of every variant against ReLU, at equal held-out L0.

    Each row is compared with the other variant's row of the same seed with the nearest held-out L0. A variant wins or loses if
    it does so on every seed and each pair of L0s is within 5 %; otherwise the comparison is undecided.
    """
    rows = [row for row in rows if row["table"] == "sae"]
    variants = [name for name in _distinct(rows, "variant") if name != "relu"]
    pairs = [("batch_topk", "topk"), ("abs_topk", "topk"), *((name, "relu") for name in variants)]
    lines = []
    for one, other in pairs:
        ours, others = ([row for row in rows if row["variant"] == name] for name in (one, other))
        for level in _distinct(ours, "target_l0"):
            mine = [row for row in ours if row["target_l0"] == level]
            sides = [(row, theirs) for row in mine if (theirs := _nearest(row, others)) is not None]
            if sides:
                lines.append(_compared(one, other, level, sides))
    return lines


def _nearest(row: Row, others: Sequence[Row]) -> Row | None:
    """The row of the same seed with the nearest held-out L0."""
    same = [other for other in others if other["seed"] == row["seed"]]
    return min(same, key=lambda other: abs(other["l0"] - row["l0"]), default=None)


def _compared(one: str, other: str, level: int, sides: Sequence[tuple[Row, Row]]) -> str:
    gaps = [mine["fvu"] - theirs["fvu"] for mine, theirs in sides]
    word = "wins" if max(gaps) < 0 else "loses" if min(gaps) > 0 else "undecided"
    if not all(abs(mine["l0"] - theirs["l0"]) <= L0_TOLERANCE * theirs["l0"] for mine, theirs in sides):
        word = f"undecided: no {other} within {L0_TOLERANCE:.0%} of that L0"
    if (one, other) == ("abs_topk", "topk") and word == "loses":
        word += ", although its paper claims that it wins: not held"
    fvu = " vs ".join(spread((pair[i]["fvu"] for pair in sides), 4) for i in (0, 1))
    l0 = " and ".join(spread((pair[i]["l0"] for pair in sides), 1) for i in (0, 1))
    seeds = ", ".join(str(mine["seed"]) for mine, _ in sides)
    return f"{one} vs {other} at L0 {level}: FVU {fvu}, held-out L0 {l0}, seeds {seeds}: {word}"


def _distinct(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))
