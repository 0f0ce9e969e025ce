"""`Codebook`: splits a vector into groups and replaces each slice by the mean of the k most similar codes of its group.

    q_g = 1/k sum_{i in I_g} c_i,   I_g = the k codes most similar to a_g,   a = x or LayerNorm(x)

Nothing else about the vector is kept: no magnitudes, no order of the codes.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from saelab.kernels.decode import decode
from saelab.kernels.precision import widened
from saelab.kernels.sparse_acts import SparseActs, offsets_of
from saelab.saes.codebook.config import CodebookConfig
from saelab.saes.codebook.gradients import codebook_loss, straight_through
from saelab.saes.codebook.nearest import most_similar
from saelab.saes.codebook.revival import closest_inputs, draw_inputs, generator_of, kmeans, towards_anchors, usage_after


class Codebook(nn.Module):
    """Ids are global: the codes of group g start at `g * codes_per_group`. `grouped` tensors are `(n * n_groups, width)`."""

    def __init__(self, config: CodebookConfig, d_in: int, n_groups: int, with_norm: bool, seed: int) -> None:
        super().__init__()
        config.check_groups(n_groups, d_in)
        self.config, self.d_in, self.n_groups, self.seed = config, d_in, n_groups, seed
        self.d_sae, self.width, self.codes_per_group = config.d_sae, d_in // n_groups, config.d_sae // n_groups
        rows = torch.randn(self.d_sae, self.width, generator=torch.Generator().manual_seed(seed))
        self.gain = nn.Parameter(torch.ones(d_in)) if with_norm else None
        self.shift = nn.Parameter(torch.zeros(d_in)) if with_norm else None
        self.step: Tensor
        self.checked: Tensor
        self.counts: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("checked", torch.full((), -1))  # the step of the last replacement; -1: no batch seen
        self.register_buffer("counts", torch.zeros(self.d_sae, dtype=torch.int64))
        self._make_codes(rows)
        self._anchors: Tensor | None = None

    def _make_codes(self, rows: Tensor) -> None:
        if self.config.revive == "simvq":  # c = c0 A, initially the same size as other codes
            size = math.sqrt(self.width)
            self.register_buffer("frozen", rows / size)
            self.map = nn.Parameter(size * torch.eye(self.width).repeat(self.n_groups, 1, 1))
        else:
            self.table = nn.Parameter(rows)
        if self.config.revive == "online":
            self.usage: Tensor
            self.register_buffer("usage", torch.zeros(self.d_sae))

    @property
    def codes(self) -> Float[Tensor, "d_sae width"]:
        """All codes, each as wide as its group's slice."""
        if self.config.revive != "simvq":
            return widened(self.table)[0]
        return torch.bmm(*widened(self._by_group(self.get_buffer("frozen")), self.map)).flatten(0, 1)

    def _by_group(self, per_code: Tensor) -> Tensor:
        """(d_sae, ...) -> (n_groups, codes_per_group, ...), a view."""
        return per_code.unflatten(0, (self.n_groups, self.codes_per_group))

    def grouped(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n_times_groups width"]:
        """One row per slice."""
        return rearrange(x, "token (group width) -> (token group) width", group=self.n_groups)

    def norm(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """The vectors that codes are compared with: `x`, or the LayerNorm of each slice."""
        if self.gain is None or self.shift is None:
            return x
        return layer_norm(self.grouped(x), (self.width,)).view(x.shape) * self.gain + self.shift

    def select(
        self, a: Float[Tensor, "n d_in"], blocked: Bool[Tensor, " d_sae"] | None = None
    ) -> Int[Tensor, "n kept"]:
        """Ids, ascending, of the `n_groups * k` codes of each row of `a`, an output of `norm`."""
        slices, tables = self.grouped(a.detach()).unflatten(0, (len(a), self.n_groups)), self._by_group(self.codes)
        masks = None if blocked is None else self._by_group(blocked)
        groups = []
        for g in range(self.n_groups):
            mask = None if masks is None else masks[g]
            ids = most_similar(slices[:, g], tables[g], self.config.k, self.config.similarity, mask)
            groups.append(ids + g * self.codes_per_group)
        return torch.cat(groups, 1)

    def feature_acts_of(self, ids: Int[Tensor, "n kept"]) -> SparseActs:
        """Ids, ascending in each row, as feature activations: every value is 1/k (or 1, for sums)."""
        n, kept = ids.shape
        values = torch.full((n * kept,), self.config.value, dtype=self.codes.dtype, device=ids.device)
        offsets = torch.arange(n + 1, device=ids.device) * kept
        return SparseActs(values, ids.flatten(), offsets, self.d_sae)

    def encode(self, x: Float[Tensor, "n d_in"]) -> SparseActs:
        """The codes of each row, as feature activations."""
        return self.feature_acts_of(self.select(self.norm(x)))

    def by_slice(self, feature_acts: SparseActs) -> SparseActs:
        """The same feature activations with one row per slice."""
        if self.n_groups == 1:
            return feature_acts
        rows = feature_acts.rows * self.n_groups + feature_acts.features // self.codes_per_group
        counts = torch.bincount(rows, minlength=feature_acts.batch * self.n_groups)
        return SparseActs(feature_acts.values, feature_acts.features, offsets_of(counts), self.d_sae)

    def decode(self, feature_acts: SparseActs) -> Float[Tensor, "n d_in"]:
        """The mean (or sum) of the codes."""
        return decode(self.by_slice(feature_acts), self.codes).view(feature_acts.batch, self.d_in)

    def bottleneck(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_in"], SparseActs, Float[Tensor, ""]]:
        """Inside a model: the replacement for `x`, its codes, and the codebook and commitment losses."""
        a = self.norm(x)
        if self.training:
            self.prepare(a)
        feature_acts = self.feature_acts_of(self.select(a))
        if self.training:
            self.observe(a, feature_acts)
        q, config = self.grouped(self.decode(feature_acts)), self.config
        out = straight_through(self.grouped(a), q, config.gradient, config.rotation).view(x.shape)
        return out, feature_acts, codebook_loss(self.grouped(a), q, config.gradient, config.beta, len(x))

    # --- training

    @torch.no_grad()
    def prepare(self, a: Float[Tensor, "n d_in"]) -> None:
        """Before each batch: initialises codes from the first one, and replaces unused codes by inputs when due."""
        revive, step = self.config.revive, int(self.step)
        first = self.checked < 0
        due = revive == "replace" and step - int(self.checked) >= self.config.replace_every
        if not len(a) or not (first or due):
            return
        generator = generator_of(self.seed, step)
        inputs = self.grouped(a).unflatten(0, (len(a), self.n_groups)) / (self.config.value * self.config.k)
        for g in range(self.n_groups if revive != "simvq" else 0):
            table = self._by_group(self.table)[g]
            if not first:
                unused = self._by_group(self.counts)[g] == 0
                table[unused] = draw_inputs(inputs[:, g], int(unused.sum()), generator).to(table)
            elif self.config.start == "kmeans":
                table.copy_(kmeans(inputs[:, g].contiguous(), self.codes_per_group, generator))
        self.checked.copy_(self.step)
        self.counts.zero_()

    @torch.no_grad()
    def observe(self, a: Float[Tensor, "n d_in"], feature_acts: SparseActs) -> None:
        """After each selection: counts the codes used, and finds the anchors of an online codebook."""
        self.counts += torch.bincount(feature_acts.features, minlength=self.d_sae)
        if self.config.revive != "online" or not len(a):
            return
        inputs, tables = self.grouped(a).unflatten(0, (len(a), self.n_groups)), self._by_group(self.codes.detach())
        ids = (feature_acts.features % self.codes_per_group).view(len(a), self.n_groups, self.config.k)
        anchors = []
        for g in range(self.n_groups):
            usage = self._by_group(self.usage)[g]
            usage.copy_(usage_after(usage, ids[:, g].flatten()))
            anchors.append(closest_inputs(inputs[:, g].contiguous(), tables[g], self.config.similarity))
        self._anchors = torch.cat(anchors) / (self.config.value * self.config.k)

    @torch.no_grad()
    def after_step(self) -> None:
        """After an optimiser step: unused codes of an online codebook move towards their anchors."""
        self.step += 1
        if self._anchors is None:
            return
        anchors, self._anchors = self._by_group(self._anchors), None
        for g in range(self.n_groups):
            table, usage = self._by_group(self.table)[g], self._by_group(self.usage)[g]
            table.copy_(towards_anchors(table, usage, anchors[g]))
