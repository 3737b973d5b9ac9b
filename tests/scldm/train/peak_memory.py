"""What every rank of test_budget.py runs: real steps at each ZeRO stage, whose peak memory goes to a file.

python peak_memory.py CASES.json OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_of
from scldm.batch import GeneCounts
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import World, close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig, start_engine
from scldm.train.ema import EMA
from scldm.train.optim import OptimConfig, make_optimizer

LINEAR = nn.functional.linear  # ZeRO-3 puts another in its place, which keeps no bf16 weights, and leaves it there


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = world_of_environment()
    peaks = [peak_of(partial(train, case, world), world.device) for case in json.loads(cases.read_text())]
    if world.is_first:
        out.write_text(json.dumps(peaks))
    close_world()


def train(case: dict, world: World) -> None:
    """A few steps of a network on cells of which all numbers are drawn."""
    nn.functional.linear = LINEAR
    n_cells = case["cells"]
    how = {key: case[key] for key in ("zero_stage", "precision")}
    hardware = HardwareConfig(case.get("engine", "deepspeed"), micro_batch=n_cells, **how)
    network, loss_of = (vae if case["kind"] == "vae" else dit)(case)
    engine = start_engine(
        network, lambda m: make_optimizer(OptimConfig(), m), hardware, 1.0, world, n_cells * world.size
    )
    ema = EMA(engine, 0.9)
    for _ in range(3):
        engine.backward(loss_of(engine.model) / world.size)
        engine.step(1e-4)
        ema.update()


def vae(case: dict) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    ids = torch.randperm(case["n_genes"])[: case["n_given"]] + 1
    given = GeneCounts(ids, torch.poisson(torch.rand(case["cells"], len(ids))).int())
    size_B = given.counts_BS.sum(1).float()
    return (
        VAE(VAEConfig(**case["model"]), case["n_genes"]),
        lambda run: run(given, given.gene_ids, None)[1].nll_B(given, size_B).mean(),
    )


def dit(case: dict) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    n_latents, latent_width = case["latent_shape"]
    z_BLZ, t_B = torch.randn(case["cells"], n_latents, latent_width), torch.rand(case["cells"])
    return (
        DiT(DiTConfig(**case["model"]), n_latents, latent_width, {}),
        lambda run: run(z_BLZ, t_B, {}).float().square().mean(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
