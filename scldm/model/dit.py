"""The diffusion transformer over a cell's latent tokens.

Source: paper, section 3. DiT blocks with adaLN-Zero: Peebles & Xie 2023, section 3.2.
Reading order: DiTConfig, timestep_features, DiTBlock, DiT. How conditions are embedded is in conditions.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scldm.checked import Checked, check_divides, checked
from scldm.errors import InputError
from scldm.model.attention import AttentionKind, SelfAttention
from scldm.model.blocks import SwiGLU
from scldm.model.conditions import (
    INTERACTION_BYTES,
    VALUE_SCALES,
    CombinationTokens,
    ConditionMeans,
    FeatureEmbedding,
    SizeEmbedding,
    ValueEmbedding,
)

MAX_PERIOD = 10_000.0
TIME_FEATURES = 256


@dataclass(frozen=True)
class DiTConfig(Checked):
    """Shape of the diffusion transformer.

    width: model width D
    n_layers: transformer blocks
    n_heads: attention heads
    continuous: conditions whose labels are numbers and are embedded by value, so that other values can be asked for:
        linear, or log for doses and times over decades
    combination_tokens: besides the sum of all conditions' embeddings, one more for each combination that was trained
    condition_means: the network is told latents less the mean that their conditions predict, each by a shift of its
        own, and learns the rest. A combination that was never trained has its parts' shifts
    library_size: the network is told a cell's library size. Latents know it, so that without this the latent that is
        drawn and the library size that is drawn do not fit each other. The paper does not have it. CFGen does
    attention: how attention is computed, never what: plain (the formula), sdpa (torch's kernels)
    compile: torch.compile the transformer blocks. On a CPU that needs a C++ compiler
    recompute: keep a transformer block's input only, and compute the rest again in backward
    """

    width: int = checked(256, at_least=1)
    n_layers: int = checked(8, at_least=1)
    n_heads: int = checked(8, at_least=1)
    continuous: dict[str, str] = field(default_factory=dict, hash=False)  # a dict has no hash
    combination_tokens: bool = False
    condition_means: bool = False
    library_size: bool = False
    attention: Literal["plain", "sdpa"] = "sdpa"
    compile: bool = False
    recompute: bool = False

    @property
    def portable(self) -> DiTConfig:
        """The same network as any machine can run it: not compiled."""
        return replace(self, compile=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "n_heads", "width", "model.")
        for name, scale in self.continuous.items():
            if scale not in VALUE_SCALES:
                raise InputError(f"model.continuous.{name}={scale} must be one of {', '.join(VALUE_SCALES)}")


def timestep_features(t_B: Tensor) -> Tensor:
    """Sines and cosines of flow time t in [0, 1], (B, 256), float32. t x 1000 with periods up to 10,000, as in DiT."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t_B.device) / half)
    angle = 1000.0 * t_B.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class DiTBlock(nn.Module):
    """A transformer block whose shift, scale and gate come from the condition. The gates start at 0 (adaLN-Zero)."""

    def __init__(self, width: int, n_heads: int, kind: AttentionKind) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, n_heads, kind)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition_BD)[:, None].chunk(6, dim=-1)
        x_BLD = x_BLD + gate_a * self.attention(self.norm_attention(x_BLD) * (1 + scale_a) + shift_a)
        return x_BLD + gate_m * self.mlp(self.norm_mlp(x_BLD) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """Velocity of latent tokens at flow time t, given conditions.

    The embeddings of all conditions are summed, so that combinations never trained have one too. Each condition has one
    more embedding for "not given". Latents enter and leave as the autoencoder knows them: they are standardised within,
    by the moments of the training latents.

    n_labels: labels of each condition
    values: of each condition in `config.continuous`, the number that each label is, (n_labels,)
    features: of conditions whose labels are described by vectors, those of each label, (n_labels, F)
    combinations_KC: label ids of all conditions in every combination that training cells had
    interactions: whether it knows what labels do together. By default it does where two conditions have shifts, and
        all combinations take at most `INTERACTION_BYTES`
    """

    latent_mean_LZ: Tensor
    latent_std_LZ: Tensor

    def __init__(
        self,
        config: DiTConfig,
        n_latents: int,
        latent_width: int,
        n_labels: dict[str, int],
        *,
        values: Mapping[str, Tensor] | None = None,
        features: Mapping[str, Tensor] | None = None,
        combinations_KC: Tensor | None = None,
        interactions: bool | None = None,
    ) -> None:
        super().__init__()
        self.config, self.n_labels = config, n_labels
        self.latent_shape = (n_latents, latent_width)
        D, values, features = config.width, values or {}, features or {}
        self.from_latent = nn.Linear(latent_width, D)
        self.token_embedding = nn.Parameter(0.02 * torch.randn(n_latents, D))
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        # a list, in the order of n_labels: a ModuleDict refuses columns called `type` or with a dot in their name
        self.condition = nn.ModuleList()
        for name, n in n_labels.items():
            if name in config.continuous:
                self.condition.append(ValueEmbedding(values[name], config.continuous[name], D))
            elif name in features:
                self.condition.append(FeatureEmbedding(features[name], D))
            else:
                self.condition.append(nn.Embedding(n + 1, D))
        if config.library_size:
            self.size = SizeEmbedding(D)
        plain = [k for k, c in enumerate(self.condition) if isinstance(c, nn.Embedding)]
        self.means = ConditionMeans(n_labels, plain, (n_latents, latent_width))
        if combinations_KC is None:
            combinations_KC = torch.zeros(0, len(n_labels), dtype=torch.int64)
        if interactions is None:
            n_bytes = 4 * len(combinations_KC) * n_latents * latent_width
            interactions = len(plain) > 1 and 0 < n_bytes <= INTERACTION_BYTES
        self.combinations = CombinationTokens(
            combinations_KC,
            tuple(n_labels.values()),
            D,
            config.combination_tokens,
            self.latent_shape if interactions else None,
        )
        self.blocks = nn.ModuleList(DiTBlock(D, config.n_heads, config.attention) for _ in range(config.n_layers))
        self.norm_out = nn.LayerNorm(D, elementwise_affine=False)
        self.modulation_out = nn.Linear(D, 2 * D)
        self.to_velocity = nn.Linear(D, latent_width)
        self.initialise()
        self.register_buffer("latent_mean_LZ", torch.zeros(n_latents, latent_width))
        self.register_buffer("latent_std_LZ", torch.ones(n_latents, latent_width))
        if config.compile:
            for block in self.blocks:
                block.compile()

    @classmethod
    def of_tensors(
        cls,
        config: DiTConfig,
        n_latents: int,
        latent_width: int,
        n_labels: dict[str, int],
        tensors: Mapping[str, Tensor],
    ) -> DiT:
        """A network that these tensors, of a `state_dict`, fit into. The weights are not put in yet.

        Raises: InputError where what they say of conditions is not what `config` and `n_labels` say.
        """
        tables = {}
        for table in ("values_K", "features_KF"):
            keys = {name: f"condition.{k}.{table}" for k, name in enumerate(n_labels)}
            tables[table] = {name: tensors[key] for name, key in keys.items() if key in tensors}
        for name in config.continuous.keys() - tables["values_K"].keys():
            raise InputError(f"model.continuous.{name}: no values of its labels are among the weights")
        for name, table in [*tables["values_K"].items(), *tables["features_KF"].items()]:
            if len(table.shape) != (1 if name in config.continuous else 2) or len(table) != n_labels[name]:
                raise InputError(f"condition {name!r}: a table {tuple(table.shape)} for {n_labels[name]} labels")
        labels_KC = tensors.get("combinations.labels_KC")
        if labels_KC is not None:
            n_C = torch.tensor(list(n_labels.values()), device=labels_KC.device)
            if labels_KC.shape[1:] != n_C.shape or not ((labels_KC >= 0) & (labels_KC < n_C)).all():
                raise InputError(f"combinations.labels_KC {tuple(labels_KC.shape)} are not labels of {list(n_labels)}")
        return cls(
            config,
            n_latents,
            latent_width,
            n_labels,
            values=tables["values_K"],
            features=tables["features_KF"],
            combinations_KC=labels_KC,
            interactions="combinations.interaction_KLZ" in tensors,
        )

    @torch.no_grad()
    def initialise(self) -> None:
        """adaLN-Zero: every block starts as the identity, and the velocity as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0
        modulations = (module.modulation for module in self.modules() if isinstance(module, DiTBlock))
        for layer in (self.modulation_out, self.to_velocity, *modulations):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def standardise(self, latent_BLZ: Tensor) -> Tensor:
        """Latents of the autoencoder -> the flow's own scale, in which every number has mean 0 and variance 1."""
        return (latent_BLZ - self.latent_mean_LZ) / self.latent_std_LZ

    def unstandardise(self, z_BLZ: Tensor) -> Tensor:
        return z_BLZ * self.latent_std_LZ + self.latent_mean_LZ

    @torch.no_grad()
    def fit_means(self, labels_KC: Tensor, n_K: Tensor, mean_KLZ: Tensor, variance: float) -> None:
        """What is known of mean latents: the shift of each label, and what labels do together.

        labels_KC: label ids of trained combinations. n_K: cells. mean_KLZ: of standardised latents
        variance: of cells within combinations, summed over L and Z
        """
        self.means.fit(labels_KC, n_K, mean_KLZ)
        index_K = self.combinations.index(labels_KC)
        assert (index_K < len(self.combinations.labels_KC)).all(), "not all of them were trained"
        if self.combinations.interaction_KLZ is not None:
            sum_KLZ = self.means(dict(zip(self.n_labels, labels_KC.unbind(1), strict=True)))
            assert isinstance(sum_KLZ, Tensor)
            self.combinations.fit(index_K, n_K, mean_KLZ, sum_KLZ, variance)

    # --- conditions ---

    def null(self, name: str) -> int | float:
        """What stands for "not given": the id after the last label, or NaN for a continuous condition."""
        return float("nan") if name in self.config.continuous else self.n_labels[name]

    def of_labels(self, ids: dict[str, Tensor]) -> dict[str, Tensor]:
        """Conditions as `forward` takes them from label ids: those of continuous ones become their values."""
        taken = {}
        for name, embedding in zip(self.n_labels, self.condition, strict=True):
            taken[name] = embedding.values_K[ids[name]] if isinstance(embedding, ValueEmbedding) else ids[name]
        return taken

    def label_ids(self, conditions: dict[str, Tensor]) -> Tensor:
        """Label ids of all conditions, (B, C) int64. `n_labels` where none is given, or no label has the value."""
        ids = []
        for name, embedding in zip(self.n_labels, self.condition, strict=True):
            of_cell = conditions[name]
            ids.append(embedding.label_ids(of_cell) if isinstance(embedding, ValueEmbedding) else of_cell)
        return torch.stack(ids, dim=1)

    def is_given(self, conditions: dict[str, Tensor]) -> Tensor:
        """Whether each condition is given, (B, C)."""
        given = []
        for name in self.n_labels:
            of_cell = conditions[name]
            given.append(~of_cell.isnan() if of_cell.is_floating_point() else of_cell != self.n_labels[name])
        return torch.stack(given, dim=1)

    def forward(
        self,
        z_BLZ: Tensor,
        t_B: Tensor,
        conditions: dict[str, Tensor],
        with_token_B: Tensor | None = None,
        size_B: Tensor | None = None,
    ) -> Tensor:
        """Velocity dz/dt at standardised z and flow time t, (B, L, Z).

        With `condition_means` m the path of z - m differs from that of z by (1 - t) m, and its velocity by -m. The flow
        is the same, and the network sees the part of it around 0.

        conditions: of each of the model's conditions, label ids (B,), of continuous ones values. `null` if not given
        with_token_B: cells that may use the token of their combination, where the model has such. None lets all
        size_B: library sizes, for a model that is told them
        """
        mean_BLZ = self.means(conditions) if self.config.condition_means else None
        if mean_BLZ is not None:
            z_BLZ = z_BLZ - (1 - t_B[:, None, None]) * mean_BLZ
        condition_BD = self.time(timestep_features(t_B).to(z_BLZ.dtype))
        for name, embedding in zip(self.n_labels, self.condition, strict=True):
            condition_BD = condition_BD + embedding(conditions[name])
        if self.config.combination_tokens:
            condition_BD = condition_BD + self.combinations(self.label_ids(conditions), with_token_B)
        if self.config.library_size:
            assert size_B is not None, "this model is told library sizes"
            condition_BD = condition_BD + self.size(size_B)
        condition_BD = nn.functional.silu(condition_BD)
        x_BLD = self.from_latent(z_BLZ) + self.token_embedding
        for block in self.blocks:
            if self.config.recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, condition_BD, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, condition_BD)
        shift, scale = self.modulation_out(condition_BD)[:, None].chunk(2, dim=-1)
        velocity_BLZ = self.to_velocity(self.norm_out(x_BLD) * (1 + scale) + shift)
        return velocity_BLZ if mean_BLZ is None else velocity_BLZ - mean_BLZ
