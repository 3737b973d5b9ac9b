"""What every rank of test_budget.py runs: real steps at each ZeRO stage, whose peak memory goes to a file.

python peak_memory.py CASES.json OUT.json
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch

from launch.bench.measure import peak_of
from scldm.batch import GeneCounts
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import World, close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig, start_engine
from scldm.train.ema import EMA
from scldm.train.optim import OptimConfig, make_optimizer


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = world_of_environment()
    peaks = [peak_of(partial(train, case, world), world.device) for case in json.loads(cases.read_text())]
    if world.is_first:
        out.write_text(json.dumps(peaks))
    close_world()


def train(case: dict, world: World) -> None:
    """A few steps of an autoencoder on cells of which all numbers are drawn."""
    n_cells, n_genes = case["cells"], case["n_genes"]
    ids = torch.randperm(n_genes)[: case["n_given"]] + 1
    given = GeneCounts(ids, torch.poisson(torch.rand(n_cells, len(ids))).int())
    size_B = given.counts_BS.sum(1).float()
    hardware = HardwareConfig(micro_batch=n_cells, zero_stage=case["zero_stage"])
    vae = VAE(VAEConfig(**case["model"]), n_genes)
    engine = start_engine(vae, lambda m: make_optimizer(OptimConfig(), m), hardware, 1.0, world, n_cells * world.size)
    ema = EMA(engine, 0.9)
    for _ in range(3):
        _, predicted = engine.model(given, given.gene_ids, None)
        engine.backward(predicted.nll_B(given, size_B).mean() / world.size)
        engine.step(1e-4)
        ema.update()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
