"""What the two stages minimise. A stage is its loss on a micro-batch; the loop does the rest.

Losses and metrics are sums over a micro-batch's cells, by weight: divided by the number of cells in the global batch,
and added over micro-batches and ranks, they are means over the global batch whatever the world size.
Reading order: Draws, Stage, VAEStage, LDMStage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scldm import draws
from scldm.batch import CellBatch, LatentBatch
from scldm.errors import InputError
from scldm.flow.loss import drop_conditions, velocity_loss_B
from scldm.model.dit import DiT
from scldm.model.vae import VAE


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch, keyed by (seed, step, position in the global batch)."""

    seed: int
    step: int
    positions_B: Tensor

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return draws.normal(self.seed, purpose, self.step, self.positions_B, shape)

    def uniform(self, purpose: str, n: int) -> Tensor:
        return draws.uniform(self.seed, purpose, self.step, self.positions_B, n)


class Stage(Protocol):
    """validation_metric: what is judged on held-out cells, smaller is better; one of the metrics of `validation`."""

    validation_metric: str

    def loss(self, model: nn.Module, batch: Any, draw: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics), each summed over the micro-batch's cells by weight."""
        ...

    def validation(self, model: nn.Module, batch: Any, draw: Draws) -> dict[str, Tensor]:
        """Metrics of held-out cells, likewise sums."""
        ...


class VAEStage:
    """Negative ELBO: reconstruction in nats per cell + kl_weight x KL. Source: paper, section 3."""

    validation_metric = "nll"

    def __init__(self, module: VAE) -> None:
        self.module = module

    def loss(self, model: nn.Module, batch: CellBatch, draw: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.module.config
        noise = draw.normal("posterior", (config.n_latents, config.latent_width)) if config.kl_weight > 0 else None
        posterior, nb = model(batch.given, batch.asked.gene_ids, noise)
        nll_B, kl_B = nb.nll_B(batch.asked, batch.library_size_B), posterior.kl_B()
        loss = ((nll_B + config.kl_weight * kl_B) * batch.weight_B).sum()
        return loss, {"nll": (nll_B * batch.weight_B).sum(), "kl": (kl_B * batch.weight_B).sum()}

    def validation(self, model: nn.Module, batch: CellBatch, draw: Draws) -> dict[str, Tensor]:
        """At the posterior mean, so that it is the same number every time."""
        posterior, nb = model(batch.given, batch.asked.gene_ids, None)
        nll_B = nb.nll_B(batch.asked, batch.library_size_B)
        return {"nll": (nll_B * batch.weight_B).sum(), "kl": (posterior.kl_B() * batch.weight_B).sum()}


@dataclass(frozen=True)
class GuidanceConfig:
    """How conditions are hidden in training, for classifier-free guidance.

    drop_all: probability that a cell shows none of its conditions
    drop_each: probability that a condition is hidden by itself, so that the model knows every subset
    """

    drop_all: float = 0.1
    drop_each: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop_all", "drop_each"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"guidance.{name}={getattr(self, name)} must be at least 0 and below 1")


class LDMStage:
    """Flow matching on the latents of the frozen autoencoder."""

    validation_metric = "velocity_loss"

    def __init__(self, module: DiT, guidance: GuidanceConfig) -> None:
        self.module, self.guidance = module, guidance

    def loss(self, model: nn.Module, batch: LatentBatch, draw: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        hide = draw.uniform("conditions", 1 + len(batch.conditions))
        shown = drop_conditions(self.module, batch.conditions, hide, self.guidance.drop_all, self.guidance.drop_each)
        return self._velocity_loss(model, batch, draw, shown)

    def validation(self, model: nn.Module, batch: LatentBatch, draw: Draws) -> dict[str, Tensor]:
        """Conditional, at noise and times that are the same every time."""
        _, metrics = self._velocity_loss(model, batch, draw, batch.conditions)
        return metrics

    def _velocity_loss(
        self, model: nn.Module, batch: LatentBatch, draw: Draws, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        z_BLZ = self.module.standardise(batch.latent_BLZ)
        noise_BLZ = draw.normal("flow noise", self.module.latent_shape)
        t_B = draw.uniform("flow time", 1)[:, 0]
        loss_B = velocity_loss_B(model, z_BLZ, noise_BLZ, t_B, conditions)
        loss = (loss_B * batch.weight_B).sum()
        return loss, {"velocity_loss": loss.detach()}


def cells_of(batch: CellBatch | LatentBatch, bad_B: Tensor | None = None) -> str:
    """The identities of a batch's cells, for a message: `source:row`."""
    ids = batch.cell_ids_B2 if bad_B is None else batch.cell_ids_B2[bad_B]
    shown = ", ".join(f"{source}:{row}" for source, row in ids[:8].tolist())
    return shown + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def check_finite(loss: Tensor, batch: CellBatch | LatentBatch, step: int) -> None:
    """Raises: InputError naming step and cells where the loss is not a number."""
    if not torch.isfinite(loss):
        raise InputError(f"step {step}: the loss is {loss.item()} on cells (source:row) {cells_of(batch)}")
