"""One layer of a preset's real width: what test_wide.py trains on the plain engine, and what its ranks run.

python -m tests.scldm.parallel.wide FOLDER 3b        FOLDER: of the plain engine's weights. Ranks add what they found
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.config import compose
from launch.train_vae import TrainVAEConfig
from scldm.files import write_json
from scldm.model.blocks import TransformerBlock
from scldm.parallel.dist import World, close_world, world_of_environment
from scldm.parallel.engine import DeepSpeedEngine, HardwareConfig, start_engine
from scldm.train.optim import make_optimizer

STEPS, CELLS, LR = 2, 4, 1e-4  # CELLS: of a step, over all ranks
# the preset's keys, but buckets just larger than the largest weight (8,192 x 3,072 numbers), and weights are let go as
# soon as a module is over: two ranks of vae/3b's layer then take 5.5 GB, and else 8.2
SMALL: dict[str, Any] = {
    "reduce_bucket_size": 26_000_000,
    "stage3_prefetch_bucket_size": 26_000_000,
    "stage3_max_live_parameters": 30_000_000,
    "stage3_max_reuse_distance": 0,
    "sub_group_size": 20_000_000,
}


def preset(name: str) -> TrainVAEConfig:
    return compose(TrainVAEConfig, [f"vae/{name}", "hardware/many_nodes_zero3", "data.shards=none", "run_dir=none"])


def layer(config: TrainVAEConfig) -> nn.Module:
    """A transformer block, with the same weights at every call."""
    torch.manual_seed(0)
    return TransformerBlock(config.model.width, config.model.n_heads)


def trained(
    module: nn.Module, config: TrainVAEConfig, hardware: HardwareConfig, world: World, zero: dict[str, Any]
) -> tuple[Any, list[float], list[float]]:
    """Train a layer to turn random latent tokens into others, on the same global batches whatever the world.

    Returns the engine, and for each step this rank's share of the loss and the gradient's norm.
    """
    optim, deepspeed = config.optim, {"zero_optimization": zero} if zero else {}
    engine = start_engine(module, partial(make_optimizer, optim), hardware, optim.clip, world, CELLS, deepspeed)
    tokens = torch.Generator().manual_seed(1)
    share = CELLS // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    losses, norms = [], []
    for _ in range(STEPS):
        x_BLD, y_BLD = torch.randn(2, CELLS, config.model.n_latents, config.model.width, generator=tokens)
        loss = (engine.model(x_BLD[own]) - y_BLD[own]).square().mean((1, 2)).sum() / CELLS
        engine.backward(loss)
        losses.append(float(loss.detach()))
        norms.append(engine.step(LR))
    return engine, losses, norms


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    world = world_of_environment()
    config = preset(name)
    hardware = HardwareConfig("deepspeed", CELLS // world.size, zero_stage=3, offload_optimizer=True)
    zero = {key: value for key, value in config.deepspeed["zero_optimization"].items() if "hpz" not in key}
    engine, losses, norms = trained(layer(config), config, hardware, world, {**zero, **SMALL})
    assert isinstance(engine, DeepSpeedEngine)
    plain, moments = torch.load(folder / "plain.pt", mmap=True), [m for p in engine.pieces for m in p.moments.values()]
    found = {
        "losses": losses,
        "norms": norms,
        "held": sum(piece.stop - piece.start for piece in engine.pieces),
        "whole_between_steps": sum(p.numel() for p in engine.module.parameters()),
        "offloaded": engine.optimizer.offload_optimizer,
        "moments": sum(len(moment) for moment in moments),
        "moments_on": sorted({moment.device.type for moment in moments}),
        "off": sum(
            float((piece.weight - plain[piece.name].view(-1)[piece.start : piece.stop]).double().square().sum())
            for piece in engine.pieces
        ),
    }
    write_json(folder / f"{world.rank}.json", found)
    close_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
