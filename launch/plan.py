"""`scldm plan`: what a training run will take, before a GPU is touched."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.format.schema import read_manifest
from launch.config import compose
from launch.planned import SIZES, check_sizes, needs_shards, stage_of
from launch.planning.config import PlanConfig, PlanLDMConfig, PlanVAEConfig
from launch.planning.layouts import compared, comparison
from launch.planning.plan import Plan, plan_of
from scldm.parallel.deepspeed_json import check_overrides
from scldm.train.run_folder import read_config

PURPOSE = """Say what training a config takes: parameters, memory of a rank at each ZeRO stage, bytes between ranks,
FLOPs, cells/s and days. It says what the loader must deliver, and what makes the config fit if it does not. For an
autoencoder it also says what `scldm encode` takes then. Nothing is computed.
It takes the line of a run: the presets and keys of `scldm train vae`, listed here, or of `scldm train ldm`, beside some
of its own."""
EXAMPLE = """
scldm plan vae vae/70m hardware/node_8gpu data.shards=shards run_dir=runs/vae
scldm plan vae/70m hardware/node_8gpu n_genes=36130 n_cells=100_000_000
scldm plan vae/270m hardware/many_nodes hardware.nodes=128 n_genes=36130 n_cells=100_000_000 train.global_batch=8192 \\
  hardware.micro_batch=8
scldm plan ldm/base hardware/many_nodes n_latents=64 latent_width=16 n_cells=100_000_000
"""
CONFIG = PlanVAEConfig
OTHER_CONFIGS = {"plan ldm": PlanLDMConfig}
FIRST = (
    *("data.shards", "n_genes", "n_cells", "train.steps", "train.global_batch"),
    *("hardware.micro_batch", "hardware.nodes", "hardware.gpu", "hardware.zero_stage", "json"),
)
USAGE = "scldm plan [vae|ldm] [PRESET ...] [key=value ...]"


def read(words: Sequence[str]) -> PlanConfig:
    """Raises: InputError where the words do not tell the stage."""
    stage, words = stage_of(words)
    return compose(PlanVAEConfig, words) if stage == "vae" else compose(PlanLDMConfig, words)


def main(config: PlanConfig) -> Plan:
    """Print and return the plan. Raises: InputError for knowledge that is missing."""
    check_overrides(config.deepspeed)
    config = cut(with_data(config))
    plan = plan_of(config)
    others = compared(plan) if config.compare else []
    if config.json:
        print(json.dumps({**plan.to_json(), "compared": [other.row() for other in others]}, indent=1))
    else:
        print("\n".join([plan.table(), *comparison(plan, others)]))
    return plan


def with_data(config: PlanConfig) -> PlanConfig:
    """With the sizes that data.shards and the autoencoder's run have, where they are not given."""
    stage = "vae" if isinstance(config, PlanVAEConfig) else "ldm"
    known: dict[str, int] = {}
    if config.data.shards and needs_shards(config, stage):
        manifest = read_manifest(config.data.shards)
        for name, of in (("n_cells", "train"), ("n_validation", "validation"), ("n_test", "test")):
            known[name] = sum(split.n_cells for split in manifest.splits if split.name == of)
        known["n_genes"] = manifest.genes.n_genes
        known["cell_bytes"] = sum(shard.bytes for shard in manifest.shards) // max(1, manifest.n_cells)
        if manifest.kind == "latents":
            known["n_latents"], known["latent_width"] = manifest.extra["shape"]
    if isinstance(config, PlanLDMConfig) and config.vae:
        model = read_config(Path(config.vae))["model"]
        known |= {name: model[name] for name in ("n_latents", "latent_width")}
    names = (*SIZES[stage], "n_validation", *(("n_test", "cell_bytes") if stage == "vae" else ()))
    filled = {name: getattr(config, name) or known.get(name, 0) for name in names}
    config = replace(config, **filled)
    check_sizes(config, stage)
    return config


def cut(config: PlanConfig) -> PlanConfig:
    """With the nearest batches that can be split over the ranks, which is said where others are given."""
    batch, micro, n_ranks = config.train.global_batch, config.hardware.micro_batch, config.hardware.n_ranks
    if batch % (n_ranks * micro) == 0:
        return config
    most = min(micro, max(1, batch // n_ranks))
    near = next(m for m in range(most, 0, -1) if batch // n_ranks % m == 0) if batch % n_ranks == 0 else most
    whole = max(1, round(batch / (n_ranks * near))) * n_ranks * near
    print(
        f"train.global_batch={batch} can't be split over {n_ranks} ranks with hardware.micro_batch={micro}. This is a "
        f"plan of train.global_batch={whole} hardware.micro_batch={near}",
        file=sys.stderr,
    )
    return replace(
        config,
        train=replace(config.train, global_batch=whole),
        hardware=replace(config.hardware, micro_batch=near),
    )
