"""Combinations that were never trained, from trained ones: their latents, moved by what differs between the two.

A cell of an unseen combination is one of a trained combination, moved by the way between the two's means
(`CombinationMeans`). Conditions given as a number or a vector have no shifts: they are left to the network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from scldm.flow.means import CombinationMeans
from scldm.model.dit import DiT

ROWS = 1024  # combinations whose means are in memory at once
Conditions = dict[str, Tensor]  # of each of the model's conditions label ids or values, (B,), `null` where not given


def nearest_trained(dit: DiT, conditions: Conditions, means: CombinationMeans | None = None) -> Conditions:
    """For each cell the labels of a trained combination: its own, if that was trained. The very same dict, if all were.

    Of the combinations that differ in the fewest labels it is the one with the smallest d^2 / u. Here d is the distance
    between the two means, and u the usual distance of two labels of the conditions that differ. A short way has a small
    error, and cells of a label that has a close relative vary as the relative does. The rule was chosen on Kang et al.
    (benchmarks/README.md). Where the model does not know its training combinations, or a label has no shift, the
    combination itself is asked for.

    means: those of `dit`, where they were read already
    """
    if not conditions or not len(dit.combinations.labels_KC):
        return conditions
    usual_C, means = cache(lambda: _usual_way(dit)), means or CombinationMeans(dit)

    def nearest(ids_C: Tensor, given_C: Tensor) -> Tensor:
        same_KC = _matching(dit, ids_C, given_C)
        if _known(same_KC):
            return ids_C
        labels_KC = dit.combinations.labels_KC
        has_way_K = (same_KC | (_has_shift(dit, ids_C[None]) & _has_shift(dit, labels_KC))).all(1)
        n_same_K = same_KC.sum(1).masked_fill(~has_way_K, -1)
        if not has_way_K.any():
            return ids_C
        near_KC = labels_KC[n_same_K == n_same_K.max()]
        near_KC = torch.where(given_C & _shifted(dit), near_KC, ids_C).unique(dim=0)
        usual_K = ((near_KC != ids_C) * usual_C()).sum(1).sqrt()
        ways = [means.way(of, ids_C, given_C).square().sum((1, 2)) for of in near_KC.split(ROWS)]
        way_K = torch.cat(ways).to(usual_K)
        return near_KC[int((way_K / usual_K.clamp_min(1e-6)).argmin())]

    base_BC = _of_rows(dit, conditions, nearest)
    base = {
        name: base_BC[:, k].to(of_cell) if k in dit.means.names else of_cell
        for k, (name, of_cell) in enumerate(conditions.items())
    }
    same = all(torch.equal(base[name], conditions[name]) for name in dit.means.names.values())
    return conditions if same else base


def way(dit: DiT, base: Conditions, conditions: Conditions) -> Tensor | float:
    """From cells of some labels to those of others, (B, L, Z), of standardised latents. 0 for the very same dict."""
    if base is conditions:
        return 0.0
    way_nLZ, way_B = ways(dit, base, conditions)
    return way_nLZ[way_B].to(dit.latent_mean_LZ)


def ways(
    dit: DiT, base: Conditions, conditions: Conditions, means: CombinationMeans | None = None
) -> tuple[Tensor, Tensor]:
    """The different ways, (n, L, Z), the first of which is 0, and each cell's, (B,) int64. On the CPU.

    means: as for `nearest_trained`
    """
    means = means or CombinationMeans(dit)
    of_BC, to_BC = (dit.label_ids(_on_device(dit, x)).cpu() for x in (base, conditions))
    given_BC, C = dit.is_given(_on_device(dit, conditions)).cpu() & _shifted(dit).cpu(), to_BC.shape[1]
    moved_B = ((of_BC != to_BC) & given_BC).any(1)
    way_B = torch.zeros(len(to_BC), dtype=torch.int64)
    found = [torch.zeros(1, *dit.latent_shape)]
    if moved_B.any():
        of_to_given = [(x * given_BC)[moved_B] for x in (of_BC, to_BC)] + [given_BC[moved_B]]
        rows, row_M = torch.cat(of_to_given, 1).unique(dim=0, return_inverse=True)
        found += [means.way(row[None, :C], row[C : 2 * C], row[2 * C :].bool()) for row in rows]
        way_B[moved_B] = 1 + row_M
    return torch.cat(found), way_B


def stays(dit: DiT, own: Conditions, other: Conditions) -> Conditions:
    """`other`, where the flow knows the way there from cells with conditions `own`. For a combination that was never
    trained it is the labels of `own`, from where all is `way`. Where that has no shift either, it is `other`.
    """
    if not other:
        return other
    trained_B = _of_rows(dit, other, lambda ids_C, given_C: _known(_matching(dit, ids_C, given_C)))
    own_BC, other_BC = (dit.label_ids(_on_device(dit, of)) for of in (own, other))
    has_way_B = ((own_BC == other_BC) | ~_shifted(dit) | _has_shift(dit, own_BC) & _has_shift(dit, other_BC)).all(1)
    moved_B = ~trained_B & has_way_B
    if not moved_B.any():
        return other
    return {
        name: torch.where(moved_B.to(of_cell.device), own[name], of_cell) if k in dit.means.names else of_cell
        for k, (name, of_cell) in enumerate(other.items())
    }


def _on_device(dit: DiT, conditions: Conditions) -> Conditions:
    return {name: x.to(dit.latent_mean_LZ.device, non_blocking=True) for name, x in conditions.items()}


def _of_rows(dit: DiT, conditions: Conditions, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A function of label ids and of which are given, both (C,), for every cell, computed once where cells agree."""
    there = _on_device(dit, conditions)
    ids_BC, given_BC = dit.label_ids(there), dit.is_given(there)
    rows, row_B = torch.cat([ids_BC, given_BC], 1).unique(dim=0, return_inverse=True)
    C = ids_BC.shape[1]
    return torch.stack([of(row[:C], row[C:].bool()) for row in rows]).to(row_B.device)[row_B]


def _has_shift(dit: DiT, ids_BC: Tensor) -> Tensor:
    """Whether the labels were among those that shifts were fitted on, (B, C). False for conditions without shifts."""
    none_B = torch.zeros(len(ids_BC), dtype=torch.bool, device=ids_BC.device)
    names = dit.means.names
    return torch.stack(
        [
            dit.means.get_buffer(f"has_shift_{k}")[ids_BC[:, k]] if k in names else none_B
            for k in range(len(dit.n_labels))
        ],
        dim=1,
    )


def _usual_way(dit: DiT) -> Tensor:
    """Mean squared distance between the shifts of two trained labels of each condition, (C,). 0 where none are."""
    usual = []
    for k in range(len(dit.n_labels)):
        labels = dit.combinations.labels_KC[:, k].unique()
        shift_nLZ = dit.means.get_buffer(f"shift_{k}")[labels] if k in dit.means.names else dit.latent_mean_LZ[None]
        usual.append(2 * shift_nLZ.var(0, unbiased=len(shift_nLZ) > 1).sum())
    return torch.stack(usual)


def _shifted(dit: DiT) -> Tensor:
    """Which conditions have shifts, (C,)."""
    return torch.tensor([k in dit.means.names for k in range(len(dit.n_labels))], device=dit.latent_mean_LZ.device)


def _matching(dit: DiT, ids_C: Tensor, given_C: Tensor) -> Tensor:
    """Where each trained combination has these labels, (K, C). What is not given or has no shifts differs from none."""
    return (dit.combinations.labels_KC == ids_C) | ~(given_C & _shifted(dit))


def _known(same_KC: Tensor) -> Tensor:
    return same_KC.all(1).any() | (len(same_KC) == 0)
