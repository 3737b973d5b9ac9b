"""How far apart the cells of two combinations of labels lie: the way between their mean latents. It is also known for
combinations that were never trained.

A mean is the sum of its labels' shifts, and what the labels do together beyond that, their interaction. Training has
measured the interactions of trained combinations (`DiT.fit_means`). Three of these give that of an untrained y. One is
n, which has another label a in one condition. The others are a pair r and s that differ as y and n do: r has y's label,
and s has a. What this label does to r, it does to y: interaction(y) = interaction(n) + interaction(r) - interaction(s).
This is the latent arithmetic of scGen (Lotfollahi et al. 2019). All such parallelograms are averaged, near ones most,
as a near relative responds most alike (inverse distance weighting, Shepard 1968). What comes from few cells is drawn to
0 (empirical Bayes). There may be no parallelogram, as where no donor has both treatments. Then both ends of the way are
taken without one of the conditions, and so on down to two. What is left out goes by its shift.
Conditions given as a number or a vector have no shifts, and those that are not given say nothing: both are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from scldm.model.dit import DiT

# a weight is (the way from a to y's label x the way from r to y)^-8, of shifts. 6 to 12 are ties, 4 is worse
# (Kang et al., benchmarks/README.md)
POWER = 8
NEIGHBOURS, PAIRS = 16, 256  # nearest ones that are looked at


class CombinationMeans:
    """Ways between the means of standardised latents. All is computed on the CPU, and once for each combination."""

    def __init__(self, dit: DiT) -> None:
        names = dit.means.names
        self.shifts = {k: dit.means.get_buffer(f"shift_{k}").cpu().flatten(1) for k in names}
        self.has_shift = {k: dit.means.get_buffer(f"has_shift_{k}").cpu() for k in names}
        self.latent_shape, self.combinations = dit.latent_shape, dit.combinations
        self.tables: dict[tuple[int, ...], _Table] = {}

    @cached_property
    def measured(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Labels, interactions and cells of the combinations that were measured. Read where an unseen one comes."""
        if (raw_KLZ := self.combinations.interaction_KLZ) is None:
            return None
        n_K = self.combinations.cells_K.cpu()
        seen_K = n_K > 0
        return self.combinations.labels_KC.cpu()[seen_K], raw_KLZ.cpu().flatten(1)[seen_K], n_K[seen_K]

    def way(self, of_NC: Tensor, to_C: Tensor, given_C: Tensor) -> Tensor:
        """From several combinations to another, (N, L, Z).

        of_NC, to_C: label ids of all conditions, int64 (N, C) and (C,). given_C: which of them are given, bool (C,)
        """
        of_NC, to_C = of_NC.cpu(), to_C.cpu()
        columns = [k for k in self.shifts if given_C[k]]
        way_ND = torch.zeros(len(of_NC), math.prod(self.latent_shape))
        for k in columns:
            way_ND = way_ND + (self.shifts[k][to_C[k]] - self.shifts[k][of_NC[:, k]])
        if self.measured is not None:
            differ_NC = of_NC[:, columns] != to_C[columns]
            for differ_C in differ_NC.unique(dim=0):
                rows = (differ_NC == differ_C).all(1).nonzero()[:, 0]
                differing = {k for k, differs in zip(columns, differ_C.tolist(), strict=True) if differs}
                way_ND[rows] += self._together(of_NC[rows], to_C, columns, differing)
        return way_ND.view(-1, *self.latent_shape)

    def _together(self, of_NC: Tensor, to_C: Tensor, columns: list[int], differing: set[int]) -> Tensor | float:
        """The difference of interactions, (N, L * Z), in the most conditions in which both ends are known."""
        sets = (set(some) for size in range(len(columns), 1, -1) for some in itertools.combinations(columns, size))
        for some in sorted(sets, key=lambda some: (-len(some), -len(some & differing))):
            if not some & differing:
                continue
            kept = sorted(some)
            table = self._table(tuple(kept))
            if (to_D := table.interaction(tuple(to_C[kept].tolist()))) is None:
                continue
            of = [tuple(labels) for labels in of_NC[:, kept].tolist()]
            rows = [table.index.get(labels) for labels in of]
            if None not in rows:
                return to_D - table.shrunk_KD[rows]
            found = [x for labels in of if (x := table.interaction(labels)) is not None]
            if len(found) == len(of):
                return to_D - torch.stack(found)
        return 0.0

    def _table(self, columns: tuple[int, ...]) -> _Table:
        if columns not in self.tables:
            assert self.measured is not None
            labels_KC, raw_KD, n_K = self.measured
            shifts = [(self.shifts[k], self.has_shift[k]) for k in columns]
            noise = float(self.combinations.noise)
            self.tables[columns] = _Table(labels_KC[:, list(columns)], raw_KD, n_K, noise, shifts)
        return self.tables[columns]


class _Table:
    """The measured combinations of some conditions. Over the other conditions it is the mean of all cells.

    labels_KC: labels, int64. raw_KD: interactions as measured, D = L * Z. n_K: cells
    noise: so many cells say as much as is usual for an interaction, as in `CombinationTokens`
    shifts: of each of the conditions, (labels, L * Z), and which labels have one
    """

    def __init__(
        self, labels_KC: Tensor, raw_KD: Tensor, n_K: Tensor, noise: float, shifts: list[tuple[Tensor, Tensor]]
    ) -> None:
        self.labels_KC, row_K = labels_KC.unique(dim=0, return_inverse=True)
        self.n_K, self.noise, self.shifts = torch.zeros(len(self.labels_KC)).index_add_(0, row_K, n_K), noise, shifts
        total_KD = torch.zeros(len(self.labels_KC), raw_KD.shape[1]).index_add_(0, row_K, raw_KD * n_K[:, None])
        self.raw_KD = total_KD / self.n_K[:, None]
        self.shrunk_KD = self.raw_KD * self._share(1 / self.n_K)[:, None]
        self.rows = [tuple(labels) for labels in self.labels_KC.tolist()]
        self.index = {labels: k for k, labels in enumerate(self.rows)}
        self.found: dict[tuple[int, ...], Tensor | None] = {}

    def _share(self, variance: Tensor) -> Tensor:
        """What is kept of an interaction whose variance is so many times that of a cell."""
        return 1 / (1 + self.noise * variance)

    def interaction(self, ids: tuple[int, ...]) -> Tensor | None:
        """Of labels in these conditions, (L * Z,). None where nothing says it."""
        if (own := self.index.get(ids)) is not None:
            return self.shrunk_KD[own]
        if ids not in self.found:
            self.found[ids] = self._by_relatives(ids)
        return self.found[ids]

    def _by_relatives(self, ids: tuple[int, ...]) -> Tensor | None:
        way_CK = self._ways(ids)
        same_CK, way_K = self.labels_KC.T == torch.tensor(ids)[:, None], way_CK.sum(0)
        found = [(c, *rows) for c in range(len(ids)) for rows in self._parallelograms(c, ids, way_CK, same_CK)]
        if not found:
            return None
        c_T, n_T, r_T, s_T = torch.tensor(found).T
        share_T = self._share(1 / self.n_K[n_T] + 1 / self.n_K[r_T] + 1 / self.n_K[s_T])
        weight_T = (-POWER / 2 * (way_CK[c_T, n_T].log() + way_K[r_T].log()) + share_T.log()).softmax(0)
        return ((weight_T * share_T)[:, None] * (self.raw_KD[n_T] + self.raw_KD[r_T] - self.raw_KD[s_T])).sum(0)

    def _ways(self, ids: tuple[int, ...]) -> Tensor:
        """Squared distance between the shifts of each combination's labels and of `ids`, (C, K), inf without one."""
        way_CK = []
        for c, (shift_nD, has_n) in enumerate(self.shifts):
            way_n = (shift_nD - shift_nD[ids[c]]).square().sum(1).clamp_min(1e-12)
            way_n = way_n.masked_fill(~(has_n & has_n[ids[c]]), torch.inf)
            way_n[ids[c]] = 0.0
            way_CK.append(way_n[self.labels_KC[:, c]])
        return torch.stack(way_CK)

    def _parallelograms(
        self, c: int, ids: tuple[int, ...], way_CK: Tensor, same_CK: Tensor
    ) -> Iterator[tuple[int, int, int]]:
        """Rows n, r and s that say what condition c's label does, the nearest ones.

        way_CK: squared ways of each label. same_CK: where labels are those asked for
        """
        others_K = same_CK[torch.arange(len(ids)) != c].all(0)
        pairs = _nearest(way_CK.sum(0), same_CK[c], PAIRS)
        for n in _nearest(way_CK[c], others_K, NEIGHBOURS):
            a = (self.rows[n][c],)
            for r in pairs:
                if (s := self.index.get(self.rows[r][:c] + a + self.rows[r][c + 1 :])) is not None:
                    yield n, r, s


def _nearest(way_K: Tensor, among_K: Tensor, most: int) -> list[int]:
    """The rows with the shortest ways, of those that have one."""
    rows = (among_K & (way_K > 0) & way_K.isfinite()).nonzero()[:, 0]
    return rows[way_K[rows].argsort(stable=True)[:most]].tolist()
