"""How latents are drawn, as a user says it. It knows no tensor, so that what is wrong is said at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from scldm.arguments import one_of
from scldm.checked import Checked, checked
from scldm.errors import InputError

Method = Literal["euler", "heun", "adaptive", "sde_euler", "sde_heun"]
GuidanceKind = Literal["joint", "additive", "compositional", "shift"]


@dataclass(frozen=True)
class SamplerConfig(Checked):
    """How latents are drawn.

    method: ODE by euler (one network evaluation a step), heun (two) or adaptive (as many as the tolerance asks for).
        SDE by sde_euler (one) or sde_heun (two)
    n_steps: steps from noise to latent. adaptive chooses its own
    guidance: joint (all conditions at once) or additive (each by itself, with a weight of its own). Two more kinds are
        as joint for trained combinations. For a combination that was never trained, shift takes latents of the nearest
        trained one and moves them by the way between the two means. compositional composes it of its trained parts
    guidance_scale: 0 ignores the conditions, 1 follows them, above 1 exaggerates them
    guidance_weights: additive: the scale of each condition by itself. guidance_scale for those not named
    guidance_from: flow time, 0 (cell) to 1 (noise), below which all scales are 1
    guidance_to: flow time above which all scales are 1
    tolerance: adaptive: relative and absolute error of a step
    diffusion: SDE: its noise, g^2 = diffusion x t
    """

    method: Method = "heun"
    n_steps: int = checked(50, at_least=1)
    guidance: GuidanceKind = "shift"
    guidance_scale: float = checked(1.0, at_least=0)
    guidance_weights: dict[str, float] = checked(factory=dict, at_least=0)
    guidance_from: float = checked(0.0, at_least=0, below=1)
    guidance_to: float = checked(1.0, above=0, at_most=1)
    tolerance: float = checked(1e-5, above=0, below=1)
    diffusion: float = checked(1.0, above=0)

    def __hash__(self) -> int:
        """Its weights are a mapping, which has no hash."""
        return hash(tuple(frozenset(of.items()) if isinstance(of, Mapping) else of for of in vars(self).values()))

    @property
    def is_sde(self) -> bool:
        return self.method.startswith("sde")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():  # numbers of numpy, which JSON does not know
            if isinstance(value, Mapping):
                value = {key: of.item() if isinstance(of, np.generic) else of for key, of in value.items()}
            object.__setattr__(self, name, value.item() if isinstance(value, np.generic) else value)
        one_of("sampler.method", self.method, Method)
        one_of("sampler.guidance", self.guidance, GuidanceKind)
        if self.guidance_weights and self.guidance != "additive":
            raise InputError(f"sampler.guidance_weights are for guidance=additive. {self.guidance} has one scale")
        low, high = self.guidance_from, self.guidance_to
        if low >= high:
            raise InputError(f"sampler.guidance_from={low} and sampler.guidance_to={high} must be 0 <= from < to <= 1")
