"""The diffusion transformer over a cell's latent tokens.

Source: paper, section 3; DiT blocks with adaLN-Zero: Peebles & Xie 2023, section 3.2.
Reading order: DiTConfig, timestep_features, DiTBlock, DiT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scldm.errors import InputError
from scldm.model.attention import SelfAttention
from scldm.model.blocks import SwiGLU

MAX_PERIOD = 10_000.0
TIME_FEATURES = 256


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the diffusion transformer.

    width: model width D
    n_layers: transformer blocks
    n_heads: attention heads
    """

    width: int = 256
    n_layers: int = 8
    n_heads: int = 8

    def __post_init__(self) -> None:
        for name in ("width", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.width % self.n_heads:
            raise InputError(f"model.n_heads={self.n_heads} does not divide model.width={self.width}")


def timestep_features(t_B: Tensor) -> Tensor:
    """Sines and cosines of flow time t in [0, 1], (B, 256), float32; t x 1000 with periods up to 10,000, as in DiT."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t_B.device) / half)
    angle = 1000.0 * t_B.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class DiTBlock(nn.Module):
    """A transformer block whose shift, scale and gate come from the condition; the gates start at 0 (adaLN-Zero)."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, n_heads)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition_BD)[:, None].chunk(6, dim=-1)
        x_BLD = x_BLD + gate_a * self.attention(self.norm_attention(x_BLD) * (1 + scale_a) + shift_a)
        return x_BLD + gate_m * self.mlp(self.norm_mlp(x_BLD) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """Velocity of latent tokens at flow time t, given conditions.

    The embeddings of all conditions are summed, so that combinations never trained have one too; each condition has one
    more embedding for "not given". Latents enter and leave as the autoencoder knows them: they are standardised within,
    by the moments of the training latents.
    """

    latent_mean_LZ: Tensor
    latent_std_LZ: Tensor

    def __init__(self, config: DiTConfig, n_latents: int, latent_width: int, n_labels: dict[str, int]) -> None:
        super().__init__()
        self.config, self.n_labels = config, n_labels
        self.latent_shape = (n_latents, latent_width)
        D = config.width
        self.from_latent = nn.Linear(latent_width, D)
        self.token_embedding = nn.Parameter(0.02 * torch.randn(n_latents, D))
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        # a list, in the order of n_labels: a ModuleDict refuses columns called `type` or with a dot in their name
        self.condition = nn.ModuleList(nn.Embedding(n + 1, D) for n in n_labels.values())
        self.blocks = nn.ModuleList(DiTBlock(D, config.n_heads) for _ in range(config.n_layers))
        self.norm_out = nn.LayerNorm(D, elementwise_affine=False)
        self.modulation_out = nn.Linear(D, 2 * D)
        self.to_velocity = nn.Linear(D, latent_width)
        self.initialise()
        self.register_buffer("latent_mean_LZ", torch.zeros(n_latents, latent_width))
        self.register_buffer("latent_std_LZ", torch.ones(n_latents, latent_width))

    def initialise(self) -> None:
        """adaLN-Zero: every block starts as the identity, and the velocity as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        modulations = (module.modulation for module in self.modules() if isinstance(module, DiTBlock))
        for layer in (self.modulation_out, self.to_velocity, *modulations):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def standardise(self, latent_BLZ: Tensor) -> Tensor:
        """Latents of the autoencoder -> the flow's own scale, in which every number has mean 0 and variance 1."""
        return (latent_BLZ - self.latent_mean_LZ) / self.latent_std_LZ

    def unstandardise(self, z_BLZ: Tensor) -> Tensor:
        return z_BLZ * self.latent_std_LZ + self.latent_mean_LZ

    def null_id(self, name: str) -> int:
        """The label id that stands for "not given"."""
        return self.n_labels[name]

    def forward(self, z_BLZ: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Velocity dz/dt at standardised z and flow time t, (B, L, Z).

        conditions: for each of the model's conditions, label ids (B,), `null_id` where not given
        """
        condition_BD = self.time(timestep_features(t_B).to(z_BLZ.dtype))
        for name, embedding in zip(self.n_labels, self.condition, strict=True):
            condition_BD = condition_BD + embedding(conditions[name])
        condition_BD = nn.functional.silu(condition_BD)
        x_BLD = self.from_latent(z_BLZ) + self.token_embedding
        for block in self.blocks:
            x_BLD = block(x_BLD, condition_BD)
        shift, scale = self.modulation_out(condition_BD)[:, None].chunk(2, dim=-1)
        return self.to_velocity(self.norm_out(x_BLD) * (1 + scale) + shift)
