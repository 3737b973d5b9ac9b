"""Where the cells of any combination of labels lie: their mean latent, for combinations that were never trained too.

A mean is the sum of its labels' shifts, and what the labels do together beyond that, their interaction. Training has
measured the interactions of trained combinations (`DiT.fit_means`). Three of these say one of y: n, with another label
a in one condition, and a pair r and s that differ as y and n do, r with y's label and s with a. What this label does to
r, it does to y: interaction(y) = interaction(n) + interaction(r) - interaction(s). This is the latent arithmetic of
scGen (Lotfollahi et al. 2019). All such parallelograms are averaged, near ones most, as a near relative responds most
alike (inverse distance weighting, Shepard 1968). Where there is none, y is the sum of its shifts.
Conditions given as a number or a vector have no shifts, and those that are not given say nothing: both are left out.
Reading order: CombinationMeans, _Table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from scldm.model.dit import DiT

# a weight is (the way from a to y's label x the way from r to y)^-8, of shifts. 6 to infinity are ties, 2 is worse
# (Kang et al., benchmarks/README.md)
POWER = 8
NEIGHBOURS, PAIRS = 16, 256  # nearest ones that are looked at, which keeps a combination to milliseconds


class CombinationMeans:
    """The mean of standardised latents of any combination of labels. All is computed on the CPU."""

    def __init__(self, dit: DiT) -> None:
        names = dit.means.names
        self.shifts = {k: dit.means.get_buffer(f"shift_{k}").cpu().flatten(1) for k in names}
        self.has_shift = {k: dit.means.get_buffer(f"has_shift_{k}").cpu() for k in names}
        self.labels_KC = dit.combinations.labels_KC.cpu()
        interaction_KLZ = dit.combinations.interaction_KLZ
        self.interaction_KD = None if interaction_KLZ is None else interaction_KLZ.cpu().flatten(1)
        self.latent_shape = dit.latent_shape
        self.table = cache(lambda columns: _Table.of(self, columns))

    def __call__(self, ids_C: Tensor, given_C: Tensor) -> Tensor:
        """(L, Z).

        ids_C: label ids of all conditions. given_C: which of them are given
        """
        ids_C, columns = ids_C.cpu(), self._columns(given_C)
        total_D = self._shifts(ids_C[None], columns)[0]
        if columns and self.interaction_KD is not None:
            total_D = total_D + self._interaction(ids_C[columns], self.table(tuple(columns)))
        return total_D.view(self.latent_shape)

    def of_trained(self, ids_NC: Tensor, given_C: Tensor) -> Tensor:
        """The same of many combinations, which all were trained, (N, L, Z)."""
        ids_NC, columns = ids_NC.cpu(), self._columns(given_C)
        total_ND = self._shifts(ids_NC, columns)
        if columns and self.interaction_KD is not None:
            table = self.table(tuple(columns))
            total_ND = total_ND + table.interaction_KD[[table.index[tuple(x)] for x in ids_NC[:, columns].tolist()]]
        return total_ND.view(-1, *self.latent_shape)

    def _columns(self, given_C: Tensor) -> list[int]:
        """The conditions that are given and have shifts."""
        return [k for k in self.shifts if given_C[k]]

    def _shifts(self, ids_NC: Tensor, columns: list[int]) -> Tensor:
        """The sum of the labels' shifts, (N, L * Z)."""
        none_ND = torch.zeros(len(ids_NC), math.prod(self.latent_shape))
        return sum((self.shifts[k][ids_NC[:, k]] for k in columns), start=none_ND)

    def _interaction(self, ids_C: Tensor, table: _Table) -> Tensor:
        own = table.index.get(tuple(ids_C.tolist()))
        if own is not None:
            return table.interaction_KD[own]
        way_CK = table.ways(self, ids_C)
        same_CK, way_K = table.labels_KC.T == ids_C[:, None], way_CK.sum(0)
        found = [(c, *rows) for c in range(len(ids_C)) for rows in table.parallelograms(c, way_CK[c], way_K, same_CK)]
        if not found:
            return torch.zeros(table.interaction_KD.shape[1])
        c_T, n_T, r_T, s_T = torch.tensor(found).T
        weight_T = (-POWER / 2 * (way_CK[c_T, n_T].log() + way_K[r_T].log())).softmax(0)
        e_KD = table.interaction_KD
        return weight_T @ (e_KD[n_T] + e_KD[r_T] - e_KD[s_T])


class _Table:
    """The trained combinations of some conditions.

    labels_KC: their labels. interaction_KD: means over the other conditions. index: labels -> row
    """

    def __init__(self, columns: tuple[int, ...], labels_KC: Tensor, interaction_KD: Tensor) -> None:
        self.columns, self.labels_KC, self.interaction_KD = columns, labels_KC, interaction_KD
        self.index = {tuple(labels): k for k, labels in enumerate(labels_KC.tolist())}

    @classmethod
    def of(cls, means: CombinationMeans, columns: tuple[int, ...]) -> _Table:
        labels_KC, row_K = means.labels_KC[:, list(columns)].unique(dim=0, return_inverse=True)
        assert means.interaction_KD is not None
        total_KD = torch.zeros(len(labels_KC), means.interaction_KD.shape[1]).index_add_(0, row_K, means.interaction_KD)
        return cls(columns, labels_KC, total_KD / row_K.bincount(minlength=len(labels_KC))[:, None])

    def ways(self, means: CombinationMeans, ids_C: Tensor) -> Tensor:
        """Squared distance between the shifts of each combination's labels and of `ids_C`, (C, K), inf without one."""
        way_CK = []
        for c, k in enumerate(self.columns):
            shift_nD, has_n = means.shifts[k], means.has_shift[k] & means.has_shift[k][ids_C[c]]
            way_n = (shift_nD - shift_nD[ids_C[c]]).square().sum(1).clamp_min(1e-12)
            way_n = way_n.masked_fill(~has_n, torch.inf)
            way_n[ids_C[c]] = 0.0
            way_CK.append(way_n[self.labels_KC[:, c]])
        return torch.stack(way_CK)

    def parallelograms(self, c: int, way_c_K: Tensor, way_K: Tensor, same_CK: Tensor) -> Iterator[tuple[int, int, int]]:
        """Rows n, r and s that say what condition c's label does, the nearest ones.

        way_c_K, way_K: squared ways of that condition's label, and of all. same_CK: where labels are those asked for
        """
        others_K = same_CK[torch.arange(len(same_CK)) != c].all(0)
        pairs = _nearest(way_K, same_CK[c], PAIRS)
        for n in _nearest(way_c_K, others_K, NEIGHBOURS):
            a = int(self.labels_KC[n, c])
            for r in pairs:
                labels = self.labels_KC[r].tolist()
                labels[c] = a
                if (s := self.index.get(tuple(labels))) is not None:
                    yield n, r, s


def _nearest(way_K: Tensor, among_K: Tensor, most: int) -> list[int]:
    """The rows with the shortest ways, of those that have one."""
    rows = (among_K & (way_K > 0) & way_K.isfinite()).nonzero()[:, 0]
    return rows[way_K[rows].argsort(stable=True)[:most]].tolist()
