"""A small conditional flow on latent vectors: flow matching on the linear path, an MLP as the velocity.

The path and the solver are the project's own. What differs from CFGen: conditions are summed embeddings, so that an
unseen combination can be asked for, and there is no guidance.
Source: Lipman et al. 2023; Palma et al. 2025 (CFGen).
Reading order: Latents, VelocityMLP, Flow, train_flow.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.work import Clock
from scldm.flow.path import interpolate, velocity
from scldm.flow.solver import heun

WIDTH, N_BLOCKS, N_FREQUENCIES = 256, 3, 32
BATCH, LR, EMA = 256, 1e-3, 0.999
VALIDATE_EVERY, PATIENCE, VALIDATION_DRAWS = 100, 20, 8
N_STEPS = 50  # of Heun's method, as ours by default


@dataclass(frozen=True)
class Latents:
    """mean, std: of each cell's latent, (n, d); codes: numbers of its labels, (n, conditions)"""

    mean: np.ndarray
    std: np.ndarray
    codes: np.ndarray


class VelocityMLP(nn.Module):
    """(z, t, label numbers) -> velocity, all (B, d); residual blocks with layer norm."""

    def __init__(self, width_in: int, n_labels: list[int]) -> None:
        super().__init__()
        self.inward = nn.Linear(width_in, WIDTH)
        self.time = nn.Sequential(nn.Linear(2 * N_FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.labels = nn.ModuleList(nn.Embedding(n, WIDTH) for n in n_labels)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(N_BLOCKS)
        )
        self.outward = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, width_in))

    def forward(self, z_BZ: Tensor, t_B: Tensor, codes_BC: Tensor) -> Tensor:
        angle = t_B[:, None] * torch.logspace(0, 3, N_FREQUENCIES)  # periods from 6 to 0.006
        context = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        for k, embedding in enumerate(self.labels):
            context = context + embedding(codes_BC[:, k])
        x = self.inward(z_BZ) + context
        for block in self.blocks:
            x = x + block(x + context)
        return self.outward(x)


@dataclass(frozen=True)
class Flow:
    """net: on standardised latents; shift, scale: of each latent number, (d,); facts: how it was trained"""

    net: VelocityMLP
    shift: Tensor
    scale: Tensor
    cpu_s: float
    facts: dict[str, Any]

    @torch.no_grad()
    def draw(self, codes: np.ndarray, seed: int) -> np.ndarray:
        """Latents of these label numbers, (n, d)."""
        codes_BC = torch.from_numpy(codes)
        noise_BZ = torch.randn(len(codes), len(self.shift), generator=torch.Generator().manual_seed(seed))
        z_BZ = heun(lambda z, t: self.net(z, torch.full((len(z),), t), codes_BC), noise_BZ, N_STEPS)
        return (z_BZ * self.scale + self.shift).numpy()


def train_flow(train: Latents, validation: Latents, n_labels: list[int], seconds: float, seed: int) -> Flow:
    """A flow from noise to the training cells' latents, the averaged weights at their best validation loss.

    It ends after 20 validations without a better loss, or at so many CPU-seconds.
    """
    clock = Clock()
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    mean, std, codes = (torch.from_numpy(np.ascontiguousarray(x)) for x in (train.mean, train.std, train.codes))
    mean, std = mean.float(), std.float()
    shift = mean.mean(0)
    scale = (mean.var(0, correction=0) + std.square().mean(0)).sqrt().clamp_min(1e-6)
    net = VelocityMLP(mean.shape[1], n_labels)
    averaged = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)

    def loss_of(model: VelocityMLP, latent: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latent.shape, generator=generator)
        t = torch.rand(len(latent), generator=generator)
        # the project's path is of tokens, (B, L, Z): here L is 1
        z_BZ = interpolate(latent[:, None], noise[:, None], t)[:, 0]
        return (model(z_BZ, t, codes) - velocity(latent, noise)).square().mean()

    def standardised(mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
        return (mean + std * torch.randn(mean.shape, generator=generator) - shift) / scale

    @torch.no_grad()
    def validate() -> float:
        same = torch.Generator().manual_seed(0)
        of = torch.from_numpy(validation.mean).float(), torch.from_numpy(validation.std).float()
        losses = [
            loss_of(averaged, standardised(*of, same), torch.from_numpy(validation.codes), same)
            for _ in range(VALIDATION_DRAWS)
        ]
        return float(torch.stack(losses).mean())

    best, best_state, best_step, stale, step, ended = math.inf, averaged.state_dict(), 0, 0, 0, ""
    while not ended:
        rows = torch.randint(len(mean), (min(BATCH, len(mean)),), generator=rng)
        loss = loss_of(net, standardised(mean[rows], std[rows], rng), codes[rows], rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        for old, new in zip(averaged.parameters(), net.parameters(), strict=True):
            old.lerp_(new.detach(), 1 - decay)
        out_of_time = clock.cpu_s >= seconds
        if step % VALIDATE_EVERY == 0 or out_of_time:
            found = validate()
            stale += 1
            if found < best:
                best, best_step, stale = found, step, 0
                best_state = copy.deepcopy(averaged.state_dict())
            ended = "budget" if out_of_time else "early stop" if stale >= PATIENCE else ""
    averaged.load_state_dict(best_state)
    facts = {"flow_steps": step, "flow_best_step": best_step, "flow_validation_loss": best, "flow_ended": ended}
    return Flow(averaged.eval(), shift, scale, clock.cpu_s, facts)
