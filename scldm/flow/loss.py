"""Flow matching: the squared error of the predicted velocity, and which conditions a training cell shows."""

from __future__ import annotations

import torch
from torch import Tensor

from scldm.flow.path import interpolate, velocity
from scldm.model.dit import DiT


def velocity_loss_B(
    model: torch.nn.Module,
    z_BLZ: Tensor,
    noise_BLZ: Tensor,
    t_B: Tensor,
    conditions: dict[str, Tensor],
    with_token_B: Tensor | None = None,
    size_B: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the velocity over a cell's latent numbers, (B,). Source: paper, section 3.

    with_token_B: which cells see their combination's token, for a model that has such
    size_B: library sizes, for a model that is told them
    """
    more = {"with_token_B": with_token_B, "size_B": size_B}
    given = {name: of_cells for name, of_cells in more.items() if of_cells is not None}
    predicted = model(interpolate(z_BLZ, noise_BLZ, t_B), t_B, conditions, **given)
    return (predicted.float() - velocity(z_BLZ, noise_BLZ)).square().mean((1, 2))


def drop_conditions(
    model: DiT, conditions: dict[str, Tensor], draws: Tensor, drop_all: float, drop_each: float
) -> dict[str, Tensor]:
    """Conditions with some replaced by "not given", for classifier-free guidance.

    draws: uniform (B, 1 + number of conditions): the first decides on all of a cell's conditions, the others on each
    drop_all, drop_each: the probabilities. Together they let one model answer to every subset of its conditions. A
        condition that is the only one is dropped by drop_all alone
    """
    dropped = {}
    drop_each = drop_each if len(conditions) > 1 else 0.0
    for k, (name, ids_B) in enumerate(conditions.items(), start=1):
        drop_B = (draws[:, 0] < drop_all) | (draws[:, k] < drop_each)
        dropped[name] = ids_B.masked_fill(drop_B, model.null(name))
    return dropped
