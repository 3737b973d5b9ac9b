"""What the two stages minimise. A stage is its loss on a micro-batch. The loop does the rest.

Losses and metrics are sums over a micro-batch's cells, by weight. They are divided by the number of cells in the global
batch, and added over micro-batches and ranks. So they are means over the global batch whatever the world size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from scldm import draws
from scldm.batch import CellBatch, GeneCounts, LatentBatch
from scldm.checked import Checked, checked
from scldm.flow.loss import drop_conditions, velocity_loss_B
from scldm.model.dit import DiT
from scldm.model.predicted import Posterior
from scldm.model.vae import VAE


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch, keyed by (seed, step, position in the global batch)."""

    seed: int
    step: int
    positions_B: Tensor

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return draws.normal(self.seed, purpose, self.step, self.positions_B, shape)

    def uniforms(self, n_of: Mapping[str, int]) -> dict[str, Tensor]:
        return draws.uniforms(self.seed, n_of, self.step, self.positions_B)


class Stage(Protocol):
    """validation_metric: what is judged on held-out cells, smaller is better. It is a metric of `validation`."""

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
        nll_B, kl_B = nb.nll_B(batch.asked, self._library_size_B(batch)), posterior.kl_B()
        loss = ((nll_B + config.kl_weight * kl_B) * batch.weight_B).sum()
        return loss, {"nll": (nll_B * batch.weight_B).sum(), "kl": (kl_B * batch.weight_B).sum()}

    def validation(self, model: nn.Module, batch: CellBatch, draw: Draws) -> dict[str, Tensor]:
        """At the posterior mean, so that it is the same number every time."""
        posterior, nb = model(batch.given, batch.asked.gene_ids, None)
        nll_B = nb.nll_B(batch.asked, self._library_size_B(batch))
        return {"nll": (nll_B * batch.weight_B).sum(), "kl": (posterior.kl_B() * batch.weight_B).sum()}

    def _library_size_B(self, batch: CellBatch) -> Tensor:
        """What shares are of: the asked genes' total. A value of the gaussian likelihood is one of the whole cell."""
        gaussian = self.module.config.likelihood == "gaussian"
        return batch.library_size_all_B if gaussian else batch.library_size_B


@dataclass(frozen=True)
class GuidanceConfig(Checked):
    """How conditions are hidden in training, for classifier-free guidance.

    drop_all: probability that a cell shows none of its conditions
    drop_each: probability that one of several conditions is hidden by itself, so that the model knows every subset
    drop_token: probability that a cell does not show its combination's token (model.combination_tokens), so that the
        model knows how to do without, as for combinations that it has none of
    """

    drop_all: float = checked(0.1, at_least=0, below=1)
    drop_each: float = checked(0.1, at_least=0, below=1)
    drop_token: float = checked(0.5, at_least=0, below=1)


@dataclass(frozen=True)
class FlowConfig(Checked):
    """At which flow times, from 0 (cell) to 1 (noise), the velocity is learnt.

    time: uniform, or logit_normal, which puts more weight on times between (Esser et al. 2024)
    time_mean: logit_normal: mean of logit(t)
    time_std: logit_normal: its standard deviation
    """

    time: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = checked(0.0)
    time_std: float = checked(1.0, above=0)

    @property
    def n_draws(self) -> int:
        """Uniform draws for a cell's time."""
        return 1 if self.time == "uniform" else 2

    def time_B(self, u_BK: Tensor) -> Tensor:
        """Flow times, (B,), of so many uniform draws."""
        if self.time == "uniform":
            return u_BK[:, 0]
        return torch.sigmoid(self.time_mean + self.time_std * draws.normal_of(u_BK, (1,))[:, 0])


class LDMStage:
    """Flow matching on the latents of the frozen autoencoder.

    encode: the autoencoder, for batches of cells instead of latents
    """

    validation_metric = "velocity_loss"

    def __init__(
        self,
        module: DiT,
        guidance: GuidanceConfig,
        flow: FlowConfig | None = None,
        encode: Callable[[GeneCounts], Posterior] | None = None,
    ) -> None:
        self.module, self.guidance, self.flow, self.encode = module, guidance, flow or FlowConfig(), encode

    def loss(self, model: nn.Module, batch: LatentBatch | CellBatch, draw: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        guidance, n_of = self.guidance, self._n_draws(self.flow) | {"conditions": 1 + len(batch.conditions)}
        if self.module.config.combination_tokens:
            n_of["combination token"] = 1
        u = draw.uniforms(n_of)
        given = self.module.of_labels(batch.conditions)
        shown = drop_conditions(self.module, given, u["conditions"], guidance.drop_all, guidance.drop_each)
        with_token_B = u["combination token"][:, 0] >= guidance.drop_token if "combination token" in u else None
        return self._velocity_loss(model, batch, u, self.flow, shown, with_token_B)

    def validation(self, model: nn.Module, batch: LatentBatch | CellBatch, draw: Draws) -> dict[str, Tensor]:
        """Conditional, at noise and times that are the same every time, and uniform whatever training prefers."""
        given, flow = self.module.of_labels(batch.conditions), FlowConfig()
        return self._velocity_loss(model, batch, draw.uniforms(self._n_draws(flow)), flow, given, None)[1]

    def _n_draws(self, flow: FlowConfig) -> dict[str, int]:
        return {"flow time": flow.n_draws, "flow noise": 2 * math.prod(self.module.latent_shape)}

    def _velocity_loss(
        self,
        model: nn.Module,
        batch: LatentBatch | CellBatch,
        u: dict[str, Tensor],
        flow: FlowConfig,
        conditions: dict[str, Tensor],
        with_token_B: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        z_BLZ = self.module.standardise(self.latents(batch))
        noise_BLZ = draws.normal_of(u["flow noise"], self.module.latent_shape)
        size_B = batch.library_size_all_B if self.module.config.library_size else None
        t_B = flow.time_B(u["flow time"])
        loss_B = velocity_loss_B(model, z_BLZ, noise_BLZ, t_B, conditions, with_token_B, size_B)
        loss = (loss_B * batch.weight_B).sum()
        return loss, {"velocity_loss": loss.detach()}

    @torch.no_grad()
    def latents(self, batch: LatentBatch | CellBatch) -> Tensor:
        """As the autoencoder gives them, (B, L, Z)."""
        if isinstance(batch, LatentBatch):
            return batch.latent_BLZ
        assert self.encode is not None
        return self.encode(batch.given).mean_BLZ.float()
