"""`scldm train ldm`: stage 2, the diffusion transformer, on a latent set."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data_pipeline.loader import LatentLoader, StreamConfig
from data_pipeline.schema import Manifest
from launch.cli import run_verb
from launch.training import Parts, check_has_validation, run_training
from scldm.model.dit import DiT, DiTConfig
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.losses import GuidanceConfig, LDMStage
from scldm.train.optim import OptimConfig
from scldm.train.tracking import TrackingConfig

PURPOSE = (
    "Train the diffusion transformer on latents that `scldm encode` wrote. Run again with the same run_dir, it resumes."
)
EXAMPLE = """
scldm train ldm ldm/tiny hardware/cpu data.shards=latents run_dir=runs/ldm
torchrun --standalone --nproc-per-node 8 -m launch.train_ldm ldm/base data.shards=latents run_dir=runs/ldm
"""
MIN_STD = 1e-6  # a latent number that is the same in every cell can't be scaled to variance 1


@dataclass(frozen=True)
class TrainLDMConfig:
    """Stage 2. The conditions are those of the latent set.

    run_dir: folder of the run
    """

    run_dir: str
    data: StreamConfig
    model: DiTConfig = field(default_factory=DiTConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, schedule="cosine"))
    train: TrainConfig = field(default_factory=TrainConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


CONFIG = TrainLDMConfig


def main(config: TrainLDMConfig) -> dict[str, float]:
    """Train; returns the last validation metrics."""
    return run_training("train ldm", config, lambda world: set_up(config, world))


def set_up(config: TrainLDMConfig, world: World) -> Parts:
    place: Any = {
        "rank": world.rank,
        "world_size": world.size,
        "global_batch": config.train.global_batch,
        "micro_batch": config.hardware.micro_batch,
    }
    loader = LatentLoader(config.data, split="train", **place)
    check_has_validation(loader.manifest, config.data.shards)
    validation = LatentLoader(replace(config.data, balance=[]), split="validation", **place)
    n_latents, latent_width = loader.latent_shape
    n_labels = {name: loader.conditions.n_labels(name) for name in loader.conditions.names}
    combinations_KC = trained_combinations(loader.manifest)
    module = DiT(config.model, n_latents, latent_width, n_labels, combinations_KC=combinations_KC)
    extra = loader.manifest.extra
    module.latent_mean_LZ.copy_(torch.tensor(extra["mean"]))
    module.latent_std_LZ.copy_(torch.tensor(extra["std"]).clamp_min(MIN_STD))
    return Parts(module, LDMStage(module, config.guidance), loader, validation, loader.manifest)


def trained_combinations(manifest: Manifest) -> torch.Tensor:
    """Label ids of all conditions in every combination that a training cell has, (K, C) int64."""
    counts, train = manifest.statistics.combinations, manifest.split_number("train")
    assert counts.by == manifest.conditions.names
    rows = [ids for ids, n in zip(counts.ids, counts.n, strict=True) if n[train]]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(counts.by))


if __name__ == "__main__":
    sys.exit(run_verb("train ldm", sys.argv[1:]))
