"""Classifier-free guidance: the velocity that a sampler follows, as a weighted sum of the network's answers to subsets
of a cell's conditions y. One call of the network per evaluation, on a row for each subset whose weight is not 0.

- joint: v(null) + w (v(y) - v(null)). Source: paper, Eq. 11
- additive: v(null) + sum_j w_j (v(y_j) - v(null)), y_j being condition j alone. Source: Palma et al. 2024 (CFGen)
- compositional: as joint, but v(y) of a combination that was never trained is composed from the largest parts that
  were. It treats them as independent given what they share: v(a, d) + v(b, d) - v(d) where (a, d) and (b, d) were
  trained and (a, b) was not. Source: Liu et al. 2022 for the product. What is shared by inclusion and exclusion
- shift: as joint, of the nearest trained combination. What was drawn is moved afterwards (`shift.py`)

Guidance may be limited to an interval of flow time (Kynkaanniemi et al. 2024). Outside it all weights are 1. The joint
kind then follows v(y), and the others their own unexaggerated form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from scldm.errors import InputError
from scldm.flow.sampler import GuidanceKind, SamplerConfig
from scldm.model.dit import DiT

VelocityField = Callable[[Tensor, float], Tensor]
ROUNDING = 1e-9  # of flow times
Subset = frozenset[int]  # which of the model's conditions are shown, by position


def subset_weights(
    kind: GuidanceKind, given: Subset, trained: frozenset[Subset] | None, weights: Mapping[int, float], scale: float
) -> dict[Subset, float]:
    """Weight of the network's answer to each subset of a cell's given conditions. None is 0, and their sum is 1.

    trained: for the compositional kind, the subsets of `given` that training cells had with these labels
    weights: of each condition, for the additive kind
    """
    null: Subset = frozenset()
    if kind == "additive":
        terms = [(frozenset({j}), weights[j]) for j in sorted(given)]
    elif kind == "compositional" and given:
        assert trained is not None
        terms = [(subset, scale * weight) for subset, weight in composition(trained).items()]
    else:
        terms = [(given, scale)]
    out = {null: 1.0}
    for subset, weight in terms:
        out[subset] = out.get(subset, 0.0) + weight
        out[null] -= weight
    return {subset: weight for subset, weight in out.items() if abs(weight) > 1e-12}


def composition(trained: frozenset[Subset]) -> dict[Subset, float]:
    """Weights of a family of subsets, closed under taking parts, that count every condition once: 1 for each of the
    largest, less what their intersections are counted too often. Their sum is 1. A family with one largest is that."""
    weights: dict[Subset, float] = {}
    for subset in sorted(trained, key=lambda s: (-len(s), sorted(s))):
        weight = 1.0 - sum(w for larger, w in weights.items() if subset < larger)
        weights[subset] = weight
    return {subset: weight for subset, weight in weights.items() if weight}


# --- the field -----------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What the network is asked at once, and how its answers are summed.

    cell_R, weight_R: of each row
    n_B: rows of each cell
    parts: slices of rows in which no cell stands twice, so that sums have one order on every device
    conditions: of each row
    size_R: library size of each row, for a model that is told them
    plain: one row a cell, in order, of weight 1
    """

    cell_R: Tensor
    weight_R: Tensor
    n_B: Tensor
    parts: tuple[slice, ...]
    conditions: dict[str, Tensor]
    size_R: Tensor | None
    plain: bool


class GuidedField:
    """The guided velocity v(z, t) of a batch of cells, (B, L, Z), and what it has cost.

    conditions: (B,) of each of the model's conditions, `null` where not given. On the CPU, else the host waits for them
    sampler: its guidance
    size_B: library sizes, for a model that is told them. No subset of the conditions is without
    n_evaluations_B: rows that the network has answered for each cell, int64 (B,). One number without conditions

    Raises: InputError for weights of unknown conditions, or a composition of what nobody knows.
    """

    def __init__(
        self, model: DiT, conditions: dict[str, Tensor], sampler: SamplerConfig, size_B: Tensor | None = None
    ) -> None:
        self.model, self.sampler = model, sampler
        self.size_B = size_B if model.config.library_size else None
        self.n_evaluations_B: Tensor | int = 0
        names, kind, scale = list(conditions), sampler.guidance, sampler.guidance_scale
        for name in sampler.guidance_weights:
            if name not in names:
                raise InputError(
                    f"sampler.guidance_weights: condition {name!r} is unknown. The model knows "
                    f"{', '.join(names) or 'none'}"
                )
        if kind == "compositional" and names and not len(model.combinations.labels_KC):
            raise InputError("sampler.guidance=compositional: the model names no combinations that it was trained on")
        by_position = {j: sampler.guidance_weights.get(name, scale) for j, name in enumerate(names)}
        self.inside = self.outside = self._rows(conditions, kind, by_position, scale)
        if (sampler.guidance_from, sampler.guidance_to) != (0.0, 1.0):
            self.outside = self._rows(conditions, kind, dict.fromkeys(by_position, 1.0), 1.0)

    def __call__(self, z: Tensor, t: float) -> Tensor:
        low, high = self.sampler.guidance_from, self.sampler.guidance_to
        # a time that is 1 - s, on the way to noise, is off by its rounding
        rows = self.inside if low - ROUNDING <= t <= high + ROUNDING else self.outside
        n_rows = len(z) if rows is None else len(rows.cell_R)
        self.n_evaluations_B = self.n_evaluations_B + (1 if rows is None else rows.n_B)
        t_R = torch.full((n_rows,), t, device=z.device, dtype=torch.float32)
        if rows is None:
            return self.model(z, t_R, {}, size_B=self.size_B).to(z.dtype)  # under autocast it answers in another
        if rows.plain:
            return self.model(z, t_R, rows.conditions, size_B=rows.size_R).to(z.dtype)
        v_R = rows.weight_R[:, None, None] * self.model(z[rows.cell_R], t_R, rows.conditions, size_B=rows.size_R)
        v = torch.zeros_like(z)
        for part in rows.parts:
            v[rows.cell_R[part]] += v_R[part]
        return v

    def _rows(
        self, conditions: dict[str, Tensor], kind: GuidanceKind, weights: Mapping[int, float], scale: float
    ) -> _Rows | None:
        """Of all cells the first subset, then of all that have one the second, and so on. None without conditions."""
        if not conditions:
            return None
        device = self.model.latent_mean_LZ.device
        given_BC = self.model.is_given(conditions)
        given = [frozenset(j for j, is_given in enumerate(row) if is_given) for row in given_BC.tolist()]
        families = [None] * len(given)
        if kind == "compositional":
            there = {name: of_cell.to(device) for name, of_cell in conditions.items()}
            families = self.model.combinations.trained_parts(self.model.label_ids(there), given_BC)
        of_key = {key: list(subset_weights(kind, *key, weights, scale).items()) for key in zip(given, families)}
        terms = [of_key[key] for key in zip(given, families)]
        cells, chosen, parts = [], [], []
        for k in range(max(map(len, of_key.values()))):
            having = [cell for cell, of_cell in enumerate(terms) if len(of_cell) > k]
            parts.append(slice(len(cells), len(cells) + len(having)))
            cells += having
            chosen += [terms[cell][k] for cell in having]
        cell_R, weight_R = torch.tensor(cells), torch.tensor([weight for _, weight in chosen])
        shown = {}
        for j, name in enumerate(conditions):
            hidden_R = torch.tensor([j not in subset for subset, _ in chosen])
            shown[name] = conditions[name].cpu()[cell_R].masked_fill(hidden_R, self.model.null(name))
        plain = len(parts) == 1 and all(weight == 1 for _, weight in chosen)
        # all is made on the CPU, so that no GPU is waited for: the copies there are not waited for either
        of_rows = (cell_R, weight_R, cell_R.bincount(minlength=len(given)))
        cell_R, weight_R, n_B = (x.to(device, non_blocking=True) for x in of_rows)
        shown = {name: of_row.to(device, non_blocking=True) for name, of_row in shown.items()}
        size_R = None if self.size_B is None else self.size_B[cell_R]
        return _Rows(cell_R, weight_R, n_B, tuple(parts), shown, size_R, plain)
