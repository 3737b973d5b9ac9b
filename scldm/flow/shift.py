"""Combinations that were never trained, from trained ones: their latents, moved by what differs between the two.

Each label has a shift of the mean latent, fitted on the means of all trained combinations (`ConditionMeans`). A cell of
an unseen combination is one of a trained combination, moved by the labels' shifts. Source: latent arithmetic of scGen
(Lotfollahi et al. 2019), with additive shifts instead of one difference, so that groups of other composition serve.
Conditions told by a number or a vector have no shifts: they are left to the network.
Reading order: is_trained, nearest_trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from scldm.model.dit import DiT

ROWS = 1024  # combinations whose shifts are in memory at once


def is_trained(dit: DiT, conditions: dict[str, Tensor]) -> Tensor:
    """Whether some training cell had the given labels together, of the conditions that have shifts, (B,)."""
    return _of_rows(dit, conditions, lambda ids_C, given_C: _known(_matching(dit, ids_C, given_C)))


def nearest_trained(dit: DiT, conditions: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """For each cell a trained combination, its own if that was trained, and the way from there, (B, L, Z), of
    standardised latents.

    It is one that differs in as few labels as possible. Of these it has the least square of the way over the distance
    that labels of the differing conditions usually have. A short way errs less, and a label with a near relative among
    its condition's answers other conditions as that does (chosen on Kang et al.: benchmarks/README.md). A model that
    does not say what it was trained on is asked for every combination itself.
    """
    n_trained = len(dit.combinations.labels_KC)
    if not conditions or bool((dit.combinations.index(dit.label_ids(conditions)) < n_trained).all()):
        return conditions, torch.zeros(1, *dit.latent_shape, device=dit.latent_mean_LZ.device)

    usual_way = cache(lambda: _usual_way(dit))

    def nearest(ids_C: Tensor, given_C: Tensor) -> Tensor:
        same_KC = _matching(dit, ids_C, given_C)
        if _known(same_KC):
            return ids_C
        n_same_K = same_KC.sum(1)
        near_KC = dit.combinations.labels_KC[n_same_K == n_same_K.max()]
        near_KC = torch.where(given_C & _shifted(dit), near_KC, ids_C).unique(dim=0)
        way_K = torch.cat(
            [(_shift(dit, ids_C[None]) - _shift(dit, of)).square().sum((1, 2)) for of in near_KC.split(ROWS)]
        )
        usual_K = ((near_KC != ids_C) * usual_way()).sum(1).sqrt()
        return near_KC[int((way_K / usual_K.clamp_min(1e-6)).argmin())]

    base_BC = _of_rows(dit, conditions, nearest)
    base = {
        name: base_BC[:, k].to(of_cell) if k in dit.means.names else of_cell
        for k, (name, of_cell) in enumerate(conditions.items())
    }
    return base, torch.as_tensor(dit.means(conditions)) - torch.as_tensor(dit.means(base))


def shifted_from(dit: DiT, own: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Where cells with conditions `own` go by the flow, and the way from there to `other`, (B, L, Z): to a trained
    combination by the flow alone; for one that was never trained they stay where they are, and all is the way."""
    moved_B = ~is_trained(dit, other)
    by_flow = {
        name: torch.where(moved_B, own[name], of_cell) if k in dit.means.names else of_cell
        for k, (name, of_cell) in enumerate(other.items())
    }
    return by_flow, torch.as_tensor(dit.means(other)) - torch.as_tensor(dit.means(by_flow))


def _of_rows(dit: DiT, conditions: dict[str, Tensor], of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A function of label ids and of which are given, both (C,), for every cell; computed once where cells agree."""
    ids_BC, given_BC = dit.label_ids(conditions), dit.is_given(conditions)
    rows, row_B = torch.cat([ids_BC, given_BC], 1).unique(dim=0, return_inverse=True)
    C = ids_BC.shape[1]
    return torch.stack([of(row[:C], row[C:].bool()) for row in rows])[row_B]


def _usual_way(dit: DiT) -> Tensor:
    """Mean squared distance between the shifts of two trained labels of each condition, (C,); 0 where none are."""
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
    """Where each trained combination has these labels, (K, C); what is not given or has no shifts differs from none."""
    return (dit.combinations.labels_KC == ids_C) | ~(given_C & _shifted(dit))


def _known(same_KC: Tensor) -> Tensor:
    return same_KC.all(1).any() | (len(same_KC) == 0)


def _shift(dit: DiT, ids_BC: Tensor) -> Tensor:
    return torch.as_tensor(dit.means(dict(zip(dit.n_labels, ids_BC.unbind(1), strict=True))))
