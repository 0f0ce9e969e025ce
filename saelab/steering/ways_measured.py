"""One way to steer at several strengths, measured: its texts as the unsteered model and SAE read them, its predictions along
neutral texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

from saelab.models import LanguageModel
from saelab.models.sampling import Generation
from saelab.steering.bootstrap import Estimate, mean_interval
from saelab.steering.criteria import promoted_ids
from saelab.steering.fluency import distinct_ngrams, fluency, repeated_ngrams
from saelab.steering.probe import Probe
from saelab.steering.read_features import FIRES_ABOVE, Reader
from saelab.steering.report_ways import ASKED, PlanOf
from saelab.steering.reported import ReportRow
from saelab.steering.teacher_forced import Shift, Unsteered

N_PROMOTED, NEUTRAL_TOKENS = 10, 64
"""Tokens that a decoder row promotes, and of a neutral text, that count."""


class _Text(NamedTuple):
    """One steered text, as the unsteered model reads it."""

    text: str
    ids: list[int]
    fires: float
    """Share of its tokens on which the feature is read back."""
    nll: float
    probed: Any
    """Probability of the concept; None without a probe."""


class Measured:
    """Everything that the ways are measured with, and the unsteered texts."""

    def __init__(
        self,
        lm: LanguageModel,
        feature: Any,
        prompts: Sequence[str],
        neutral: Sequence[str],
        probed: Probe | None,
        how: Any,
    ) -> None:
        self.lm, self.prompts, self.how, self.probe = lm, prompts, how, probed
        self.reader = Reader(lm, [feature.handle])
        ids = [lm.to_ids(text).flatten()[:NEUTRAL_TOKENS] for text in neutral]
        self.neutral = Unsteered(lm, [Generation(one, 1, None) for one in ids if len(one) > 1])
        self.n_neutral = len(self.neutral.texts)
        self.token_sets = _token_sets(feature)
        self.unsteered = [self._texts(prompt, [None])[0] for prompt in prompts]
        self.example = self.unsteered[0][0].text
        """The first unsteered text."""

    def way(self, name: str, plan_of: PlanOf, strengths: Sequence[float]) -> list[ReportRow]:
        """One row for each strength."""
        texts = [self._texts(prompt, [plan_of(one, n) for one in strengths]) for n, prompt in enumerate(self.prompts)]
        rows = []
        for i, one in enumerate(strengths):
            along = [self.neutral.shift(n, plan_of(one, n), *self.token_sets) for n in range(self.n_neutral)]
            rows.append(self._row(name, one, [of_prompt[i] for of_prompt in texts], along))
        return rows

    def asked(self, ask: str) -> ReportRow:
        """The row of the prompt that asks: its texts are read behind the plain prompt, as all others."""
        return self._row(ASKED, None, [self._texts(prompt, [None], ask)[0] for prompt in self.prompts], [])

    def _texts(self, prompt: str, arms: Sequence[Any], before: str = "") -> list[list[_Text]]:
        """The texts of each arm, by seed."""
        every = self.lm.generate_arms(before + prompt, arms, **self.how)
        plain = self.lm.to_ids(prompt).flatten()
        new = [one.ids[one.n_prompt :] for of_arm in every for one in of_arm]
        read = self.reader.read([torch.cat([plain, ids]) for ids in new], len(plain))
        decoded = [self.lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        probed: list[Any] = [None] * len(new)
        if self.probe is not None:
            probed = self.probe.probability(self.lm, [f"{prompt}{text}" for text in decoded]).tolist()
        found = []
        for ids, text, one, p in zip(new, decoded, read, probed, strict=True):
            fires = float((one.values[0] > FIRES_ABOVE).float().mean())
            found.append(_Text(text, ids.tolist(), fires, -float(one.log_probs.mean()), p))
        n = len(self.how["seeds"])
        return [found[i : i + n] for i in range(0, len(found), n)]

    def _row(self, way: str, strength: float | None, texts: list[list[_Text]], along: list[Shift]) -> ReportRow:
        pairs = [list(zip(one, base, strict=True)) for one, base in zip(texts, self.unsteered, strict=True)]

        def over(measure: Callable[[_Text, _Text], float]) -> Estimate:
            return mean_interval([[measure(*pair) for pair in row] for row in pairs])

        def shifted(measure: Callable[[Shift], float]) -> Estimate | None:
            return mean_interval([measure(shift) for shift in along]) if along else None

        n_sets = len(self.token_sets)
        return ReportRow(
            way=way,
            strength=strength,
            read_back=over(_read_back),
            probe=None if self.probe is None else over(lambda one, base: one.probed - base.probed),
            peak_rise=shifted(lambda shift: shift.rises[0]) if n_sets else None,
            promoted_rise=shifted(lambda shift: shift.rises[1]) if n_sets > 1 else None,
            nll_cost=over(lambda one, base: one.nll - base.nll),
            neutral_cost=shifted(lambda shift: shift.nll_rise),
            kl=shifted(lambda shift: shift.kl),
            repetition=fmean(repeated_ngrams(one.ids) for row in texts for one in row),
            distinct=fmean(distinct_ngrams([one.ids for one in row]) for row in texts),
            score=over(lambda one, base: _read_back(one, base) * fluency(one.nll - base.nll, one.ids, one.text)),
            example=texts[0][0].text,
        )


def _read_back(one: _Text, base: _Text) -> float:
    return one.fires - base.fires


def _token_sets(feature: Any) -> list[list[int]]:
    """The tokens at the peaks of its strongest examples, and those whose logits its decoder row raises most, if it has logits."""
    peaks = sorted({example.token_ids[example.peak] for example in feature.examples()})
    promoted = promoted_ids(feature.store, feature.feature, feature.sign)[:N_PROMOTED]
    return [peaks, promoted] if promoted else [peaks]
