"""What an imported SAE gives on real activations, as assumed and with one assumption changed at a time.

Files of other libraries leave open, or say wrongly, whether contexts begin with BOS, whether b_dec is subtracted, whether tokens
are normalised, how pre-activations are compared, what scale the input has and which side of which layer is read. Any of these
taken wrongly still gives numbers. So a few thousand tokens are run with each alternative, and one that reconstructs clearly
better, or alone has the claimed L0, is reported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.evaluation.heldout import open_score_stream
from saelab.evaluation.reconstruction import Reconstruction
from saelab.interop.answers import revised
from saelab.interop.blueprint import TRANSCODERS, Blueprint, build
from saelab.models import LanguageModel
from saelab.models.caching import Remembered
from saelab.saes import SAE

BETTER = 0.8
"""An alternative is reported below this fraction of the assumed FVU."""
FITS = 0.15
"""An L0 within this fraction of the claimed one fits it."""
_SIDES = {"hook_resid_pre": "hook_resid_post", "hook_resid_post": "hook_resid_pre", "mlp.hook_in": "hook_resid_mid"}


class Trial(NamedTuple):
    """One way to read the files: what `assume=` would change, and what comes out."""

    change: Mapping[str, Any]
    """Empty for what was assumed."""
    l0: float
    fvu: float | None
    """None for a part of a cross-layer transcoder, which reconstructs nothing alone."""

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.change.items()) or "as assumed"


@dataclass(frozen=True)
class Check:
    """The assumed reading, its alternatives, and what the files claim."""

    assumed: Trial
    alternatives: tuple[Trial, ...]
    claimed_l0: float | None
    n_tokens: int

    @property
    def better(self) -> list[Trial]:
        """Alternatives that reconstruct clearly better or alone have the claimed L0, the best first."""
        found = [trial for trial in self.alternatives if self._lower(trial) or self._fits_better(trial)]
        return sorted(
            found, key=lambda trial: (not self._lower(trial), trial.fvu if trial.fvu is not None else trial.l0)
        )

    def _lower(self, trial: Trial) -> bool:
        return trial.fvu is not None and self.assumed.fvu is not None and trial.fvu < BETTER * self.assumed.fvu

    def _fits_better(self, trial: Trial) -> bool:
        """Only where it also reconstructs about as well: an L0 can fit by chance."""
        as_good = trial.fvu is None or self.assumed.fvu is None or trial.fvu <= self.assumed.fvu
        return as_good and self._fits(trial) and not self._fits(self.assumed)

    def _fits(self, trial: Trial) -> bool:
        claim = self.claimed_l0
        return claim is not None and abs(trial.l0 - claim) <= FITS * claim

    def warnings(self) -> list[str]:
        """One sentence for each better reading, and one if the claimed L0 is not reached."""
        said = [
            f"assume={dict(trial.change)} would give {_numbers(trial)} instead of {_numbers(self.assumed)}"
            f"{f' (claimed: L0 {self.claimed_l0:g})' if self.claimed_l0 else ''}."
            for trial in self.better
        ]
        if not said and self.claimed_l0 is not None and not self._fits(self.assumed):
            said = [
                f"The L0 is {self.assumed.l0:.1f}, but the files claim {self.claimed_l0:g}, and no alternative fits better."
            ]
        return said

    def to_json(self) -> dict[str, Any]:
        """What `sae.json` records."""
        trials = [{"change": dict(t.change), "l0": t.l0, "fvu": t.fvu} for t in (self.assumed, *self.alternatives)]
        return {"n_tokens": self.n_tokens, "claimed_l0": self.claimed_l0, "trials": trials}


def _numbers(trial: Trial) -> str:
    return f"L0 {trial.l0:.1f}" if trial.fvu is None else f"FVU {trial.fvu:.3f}, L0 {trial.l0:.1f}"


def check(plan: Blueprint, lm: LanguageModel, texts: Any, n_tokens: int = 4096, *, progress: bool = True) -> Check:
    """Run `n_tokens` tokens of `texts` through the model and the SAE, as the blueprint reads it and with each alternative.

    Raises `ValueError` if the model has no such hook, or another width.
    """
    lm = Remembered(lm)
    assumed, mean_norm, n = _measured(plan, {}, lm, texts, n_tokens)
    trials = []
    changes = list(alternatives(plan, mean_norm))
    for change in tqdm(changes, desc="Trying alternatives", disable=not progress):
        try:
            trials.append(_measured(revised(plan, change), change, lm, texts, n_tokens)[0])
        except (ValueError, SaelabError):
            continue  # the model has no such hook, or the alternative does not fit
    claimed = (plan.origin.get("claims") or {}).get("l0")
    return Check(assumed, tuple(trials), claimed, n)


def alternatives(plan: Blueprint, mean_norm: float) -> Iterator[dict[str, Any]]:
    """One changed assumption each, as `assume=` takes it; `mean_norm` is that of the activations that are read."""
    if plan.origin.get("prepend_bos") is not None:
        yield {"prepend_bos": not plan.origin["prepend_bos"]}
    if plan.variant == "crosscoder":
        return
    if plan.variant in ("topk", "abs_topk", "relu", "jumprelu", "gated"):
        yield {"pre_bias": not plan.pre_bias}
    if plan.scale == 1 and plan.scale_out in (None, 1) and plan.W_skip is None:
        yield {"normalize": "layer_norm" if plan.normalize == "none" else "none"}
    norms = plan.W_dec.float().norm(dim=1)
    if plan.variant == "topk" and float(norms.std()) > 1e-3 * float(norms.mean()):
        now = plan.options.get("score", "value")
        yield {"score": "value" if now == "decoder_norm" else "decoder_norm"}
    if plan.normalize == "none" and plan.variant not in TRANSCODERS:
        scale = round(plan.d_in**0.5 / max(mean_norm, 1e-30), 4 if mean_norm < 1e3 else 8)
        yield {"scale": 1.0 if plan.scale != 1 else scale}
    yield from _other_hooks(plan.origin.get("hook_name"), plan.origin.get("hook_name_out"))


def _other_hooks(hook: str | None, hook_out: str | None) -> Iterator[dict[str, Any]]:
    """The other side of the same block or norm, and the same hook of the layers before and after."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    if not found:
        return
    layer, kind = int(found.group(1)), found.group(2)
    if kind in _SIDES:
        yield {"hook_name": f"blocks.{layer}.{_SIDES[kind]}"}
    for other in (layer - 1, layer + 1):
        if other >= 0:
            change = {"hook_name": f"blocks.{other}.{kind}"}
            yield change | ({"hook_name_out": re.sub(r"\.\d+\.", f".{other}.", hook_out, count=1)} if hook_out else {})


@torch.no_grad()
def _measured(
    plan: Blueprint, change: Mapping[str, Any], lm: LanguageModel, texts: Any, n_tokens: int
) -> tuple[Trial, float, int]:
    """The trial, the mean norm of what was read, and the number of tokens."""
    sae = build(plan).to(lm.device)
    stream = open_score_stream(sae, lm, texts, split="all", n_tokens=n_tokens, ctx_len=context_length(plan, lm))
    measures, norms = Reconstruction(sae), 0.0
    for _, batch, keep in stream.pairs():
        kept = keep.to(batch.x.device)
        if bool(kept.any()):
            x, y = batch.x[kept].float(), batch.y[kept].float()
            norms += float(x.flatten(1).norm(dim=1).sum())
            measures.add(y, sae(x))
    results, n = measures.results(), measures.variance.n
    fvu = None if plan.origin.get("partial") else results["fvu"]
    return Trial(change, float(results["l0"] or 0.0), fvu), norms / n, n


def context_length(plan: Blueprint, lm: LanguageModel) -> int:
    """The context length of the SAE's training, as far as the model reads it; 256 if it is not known."""
    return min(int(plan.origin.get("ctx_len") or 256), lm.max_ctx)


def with_check(sae: SAE, found: Check) -> SAE:
    """The SAE with the check recorded in its origin."""
    origin = dict(sae.provenance.origin)
    origin["imported"] = {**origin["imported"], "check": found.to_json()}
    sae.provenance = dataclasses.replace(sae.provenance, origin=origin)
    return sae
