"""Classifier-free guidance. Source: paper, Eq. 11 (joint): v(null) + w (v(y) - v(null)) for attributes y."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scldm.model.dit import DiT

VelocityField = Callable[[Tensor, Tensor], Tensor]


def joint_guidance(model: DiT, conditions: dict[str, Tensor], scale: float) -> VelocityField:
    """The guided velocity field v(z, t): scale 0 is unconditional, 1 conditional; else one call on a doubled batch."""
    null = {name: torch.full_like(ids, model.null_id(name)) for name, ids in conditions.items()}
    if scale == 0 or not conditions:
        return lambda z, t: model(z, t, null)
    if scale == 1:
        return lambda z, t: model(z, t, conditions)
    both = {name: torch.cat((null[name], ids)) for name, ids in conditions.items()}

    def guided(z: Tensor, t: Tensor) -> Tensor:
        v_null, v_given = model(torch.cat((z, z)), torch.cat((t, t)), both).chunk(2)
        return v_null + scale * (v_given - v_null)

    return guided
