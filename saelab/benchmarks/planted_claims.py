"""The papers' claims that `synthetic.py` tests on its kinds of planted data, and on texts of a finite-state machine."""

from __future__ import annotations

from saelab.benchmarks.claims import Claim, Side

_TOPK = "Gao et al. 2024: at equal L0, TopK has a lower error than ReLU with L1."
_AUXK = "Gao et al. 2024: AuxK leaves few dead features."
_BATCH = "Bussmann et al. 2024 (BatchTopK): lower error than TopK at equal mean L0."
_JUMP = "Rajamanoharan et al. 2024 (JumpReLU): at a given L0 at least as faithful as Gated and TopK."
_GATED = "Rajamanoharan et al. 2024 (Gated): no shrinkage, and lower error than ReLU with L1 at equal L0."
_SHRINK = "Rajamanoharan et al. 2024 (Gated): L1 shrinks reconstructions (relative bias below 1), the gate does not."
_NESTED = "Bussmann et al. 2025 (Matryoshka): less feature absorption than BatchTopK."
_CHOICE = "Ayonrinde 2024: Mutual and Feature Choice have a lower error than TopK at equal L0, and fewer dead features."
_ZIPF = "Ayonrinde 2024: aux_zipf also trains features that are rarer than Zipf's law predicts."
_MASK = "Chidambaram et al. 2023: masking recovers an over-complete dictionary under noise better than reconstruction."
_ABS = "Zhu et al. 2026 (AbsTopK): one feature represents both directions of an axis, at a lower error than TopK."
_MP = "Costa et al. 2025 (MP-SAE): recovers hierarchical features that TopK and BatchTopK miss."
_DIFF = (
    "Minder et al. 2025: an L1 crosscoder invents exclusive features, a BatchTopK one does not; Latent Scaling tells."
)
_CODEBOOK = (
    "Tamkin et al. 2023 (codebook features): codes represent states of a machine, and forcing them moves the model."
)


def _side_by_side(text: str, data: str, left: str, right: str, measure: str, paper: str, **options: bool) -> Claim:
    """A claim that `left` has less of a measure than `right` (more, with `below=False`)."""
    return Claim(text, data, Side(left, measure), Side(right, measure), paper=paper, **options)


def _choice(sae: str, name: str) -> list[Claim]:
    """Claims about Mutual Choice and Feature Choice relative to TopK."""

    def claim(text: str, data: str, measure: str, at_equal_l0: bool) -> Claim:
        return _side_by_side(f"{name} {text}", data, sae, "topk", measure, _CHOICE, at_equal_l0=at_equal_l0)

    return [
        claim("reconstructs tokens of unequal complexity better than TopK at equal L0", "mixed", "fvu", True),
        claim("reconstructs Zipf features better than TopK at equal L0", "zipf", "fvu", True),
        claim("has fewer dead features than TopK", "zipf", "dead_fraction", False),
    ]


def _aux(sae: str, with_zipf: str, without: str) -> list[Claim]:
    """Claims about aux_zipf relative to no auxiliary loss."""
    sides = "zipf", with_zipf, without
    return [
        _side_by_side(f"aux_zipf leaves fewer features of {sae} under-used", *sides, "under_used", _ZIPF),
        _side_by_side(f"aux_zipf finds rare features of {sae} better", *sides, "mmcs_rare", _ZIPF, below=False),
    ]


_FLAT = [
    _side_by_side(
        "TopK reconstructs better than ReLU at equal L0", "flat", "topk", "relu", "fvu", _TOPK, at_equal_l0=True
    ),
    _side_by_side(
        "JumpReLU reconstructs better than Gated at equal L0",
        "flat",
        "jumprelu",
        "gated",
        "fvu",
        _JUMP,
        at_equal_l0=True,
    ),
    _side_by_side(
        "JumpReLU reconstructs better than TopK at equal L0", "flat", "jumprelu", "topk", "fvu", _JUMP, at_equal_l0=True
    ),
    _side_by_side(
        "Gated reconstructs better than ReLU at equal L0", "flat", "gated", "relu", "fvu", _GATED, at_equal_l0=True
    ),
    Claim("ReLU with L1 shrinks what it reconstructs", "flat", Side("relu", "bias"), 0.9, paper=_SHRINK),
    Claim("Gated does not shrink", "flat", Side("gated", "bias"), 0.95, below=False, paper=_SHRINK),
    _side_by_side(
        "AuxK leaves fewer dead features than no auxiliary loss", "zipf", "topk", "topk, no aux", "dead_fraction", _AUXK
    ),
    _side_by_side(
        "BatchTopK reconstructs tokens of unequal complexity better than TopK at equal L0",
        "mixed",
        "batch_topk",
        "topk",
        "fvu",
        _BATCH,
        at_equal_l0=True,
    ),
]
_HIERARCHY = [
    _side_by_side(
        "Matching pursuit reconstructs a hierarchy better than TopK at equal L0",
        "hierarchy",
        "matching_pursuit",
        "topk",
        "fvu",
        _MP,
        at_equal_l0=True,
    ),
    _side_by_side(
        "Matching pursuit finds the children better than TopK",
        "hierarchy",
        "matching_pursuit",
        "topk",
        "mmcs_children",
        _MP,
        below=False,
    ),
    _side_by_side(
        "A parent's feature is off less often than BatchTopK's where a child is on",
        "hierarchy",
        "matryoshka",
        "batch_topk",
        "absorption",
        _NESTED,
    ),
]
_SIGNED = [
    _side_by_side(
        "AbsTopK finds more of the signed axes than TopK",
        "signed",
        "abs_topk",
        "topk",
        "recovered",
        _ABS,
        below=False,
    ),
    _side_by_side("AbsTopK needs fewer features per axis", "signed", "abs_topk", "topk", "copies", _ABS),
    _side_by_side(
        "AbsTopK reconstructs signed features better", "signed", "abs_topk", "topk", "fvu", _ABS, at_equal_l0=True
    ),
]
_L1, _BATCH_CODER = "crosscoder, L1", "crosscoder, BatchTopK"
_DIFFING = [
    _side_by_side(
        "A BatchTopK crosscoder invents fewer exclusive features than an L1 one",
        "diffing",
        _BATCH_CODER,
        _L1,
        "false_exclusives",
        _DIFF,
    ),
    Claim(
        "Latent Scaling flags the exclusives that the L1 crosscoder invents, not the true ones",
        "diffing",
        Side(_L1, "flagged_false"),
        Side(_L1, "flagged_true"),
        below=False,
        paper=_DIFF,
    ),
]
_FSM = [
    Claim("States get their own codes", "fsm", Side("codebook", "purity"), 0.9, below=False, paper=_CODEBOOK),
    Claim(
        "A model with codebooks follows the machine's rules",
        "fsm",
        Side("codebook", "accuracy"),
        Side("codebook", "accuracy_bare"),
        below=False,
        times=0.95,
        paper=_CODEBOOK,
    ),
    Claim(
        "Forcing a state's codes moves the model to that state",
        "fsm",
        Side("codebook", "js_forced"),
        Side("codebook", "js_before"),
        times=0.5,
        paper=_CODEBOOK,
    ),
]
CLAIMS = [
    *_FLAT,
    *_choice("mutual_choice", "Mutual Choice"),
    *_choice("feature_choice", "Feature Choice"),
    *_aux("TopK", "topk, aux_zipf", "topk, no aux"),
    *_aux("Mutual Choice", "mutual_choice", "mutual_choice, no aux"),
    _side_by_side(
        "Hiding coordinates finds more features of noisy data with too large a dictionary and k",
        "noisy",
        "masked_topk",
        "topk",
        "recovered",
        _MASK,
        below=False,
    ),
    *_SIGNED,
    *_HIERARCHY,
    *_DIFFING,
    *_FSM,
]
ABOUT = {
    "flat": "64 planted features in 32 dimensions, 3 on a token; SAEs of 64 features.",
    "zipf": "As flat, but feature r is drawn with probability proportional to 1 / r.",
    "mixed": "As flat, but 60 % of the tokens have one feature on and 40 % have six.",
    "noisy": "As flat, with noise of 0.3 on each coordinate, SAEs of 128 features and a k of 6.",
    "signed": "As flat, but each planted activation has a random sign.",
    "hierarchy": "8 orthonormal parents of 4 children each in 24 dimensions; a token has a parent and, in 3 of 4 cases, a child.",
    "diffing": "Two models of width 24 on the same tokens: 24 shared features, 4 of each model alone, 4 weak (0.3) in one.",
    "fsm": "A transformer trained on texts of a machine of 50 states, then trained on with codebooks.",
}
"""What each kind of data is."""
