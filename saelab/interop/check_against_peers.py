"""`python -m saelab.interop.check_against_peers`: reading and writing, against the libraries.

Both directions: SAEs that saelab wrote are read by SAELens, sparsify or dictionary_learning, SAEs that these wrote are read by
saelab, and feature activations and reconstructions have to agree to 1e-5. The libraries are installed once, with this process's
torch, into a virtual environment of their own (`--environment`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab.errors import SaelabError
from saelab.interop import load_sae, save_sae
from saelab.interop.peer_worker import D_IN, D_SAE, K
from saelab.kernels.bench import peers
from saelab.saes import SAE, VARIANTS

LIBRARIES = {"sae_lens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}
TOLERANCE = 1e-5


class Row(NamedTuple):
    """One SAE that was read by the other side."""

    direction: str
    format: str
    kind: str
    feature_acts: float
    """Relative difference of the feature activations."""
    x_hat: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return not self.reason and max(self.feature_acts, self.x_hat) <= TOLERANCE


def ours() -> Iterator[tuple[str, SAE]]:
    """SAEs of every variant that other libraries know, with random weights, a centre and a scale."""
    for name, variant in VARIANTS.items():
        if name in ("crosscoder", "codebook"):
            continue
        config = {"k": K} if hasattr(variant.Config(d_sae=D_SAE), "k") else {}
        normalize = "none" if name == "matching_pursuit" else "center_and_scale"
        sae: Any = variant(variant.Config(d_sae=D_SAE, normalize=normalize, **config), D_IN, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if hasattr(sae, "n_observed"):
                sae.threshold.fill_(0.5)
                sae.n_observed.fill_(1)
        if normalize != "none":
            sae.set_normalization(torch.linspace(-1, 1, D_IN), 2.5 * D_IN)
        yield name, sae


def run(environment: Path, root: Path) -> list[Row]:
    """All comparisons, in the order in which they are made."""
    x = 2 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0)) + 0.3
    save_file({"x": x}, root / "x.safetensors")
    commands = peers.install(environment)
    missing = [name for name in LIBRARIES.values() if name not in commands]
    if missing:
        raise SaelabError(f"{', '.join(missing)} could not be installed into {environment}.")
    known: dict[tuple[str, str], SAE] = {}
    for format in LIBRARIES:
        (root / "ours" / format).mkdir(parents=True)
        for kind, sae in ours():
            try:
                save_sae(sae, root / "ours" / format / kind, format=format)
                known[format, kind] = sae
            except SaelabError:  # the format cannot hold it
                continue
    python, worker = commands[LIBRARIES["sae_lens"]][0], Path(__file__).with_name("peer_worker.py")
    subprocess.run([python, "-I", str(worker), str(root)], check=True)
    return [*_read_by_them(root, known, x), *_read_by_us(root, x)]


def _read_by_them(root: Path, known: dict[tuple[str, str], SAE], x: Tensor) -> Iterator[Row]:
    for (format, kind), sae in known.items():
        yield _row("saelab -> library", format, kind, root / "ours" / format / kind, sae, x)


def _read_by_us(root: Path, x: Tensor) -> Iterator[Row]:
    for format in LIBRARIES:
        for folder in sorted((root / "theirs" / format).iterdir()):
            sae = load_sae(folder, format=format)
            yield _row("library -> saelab", format, folder.name, folder, sae, x)


@torch.no_grad()
def _row(direction: str, format: str, kind: str, folder: Path, sae: SAE, x: Tensor) -> Row:
    if (folder / "failed.txt").exists():
        reason = (folder / "failed.txt").read_text().strip().splitlines()[-1]
        return Row(direction, format, kind, float("nan"), float("nan"), reason)
    theirs = load_file(folder / "computed.safetensors")
    pairs = (sae.encode(x).to_dense(), theirs["acts"]), (sae(x).x_hat, theirs["x_hat"])
    feature_acts, x_hat = (float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    return Row(direction, format, kind, feature_acts, x_hat)


def main() -> int:
    """Compare, print a table, and return 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m saelab.interop.check_against_peers", description=__doc__)
    default = Path("~/.cache/saelab/peers").expanduser()
    parser.add_argument(
        "--environment", type=Path, default=default, help=f"folder of the environment (default: {default})"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.environment, Path(folder))
    for row in rows:
        said = row.reason or f"activations {row.feature_acts:.1e}, reconstructions {row.x_hat:.1e}"
        print(f"{'ok' if row.agrees else 'DIFFERS':8}{row.direction:19}{row.format:21}{row.kind:60}{said}")
    print(f"{sum(row.agrees for row in rows)} of {len(rows)} agree to {TOLERANCE:g}")
    return int(not all(row.agrees for row in rows))


if __name__ == "__main__":
    sys.exit(main())
