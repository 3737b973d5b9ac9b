"""What every rank of test_budget.py runs: real steps at each ZeRO stage, whose peak memory goes to a file.

python peak_memory.py CASES.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from launch.bench.measure import measure
from scldm.batch import GeneCounts
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig, start_engine
from scldm.train.ema import EMA
from scldm.train.optim import OptimConfig, make_optimizer


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world, peaks = world_of_environment(), []
    for case in json.loads(cases.read_text()):
        config, B, n_genes = VAEConfig(**case["model"]), case["cells"], case["n_genes"]
        ids = torch.randperm(n_genes)[: case["n_given"]] + 1
        given = GeneCounts(ids, torch.poisson(torch.rand(B, len(ids))).int())
        size_B = given.counts_BS.sum(1).float()
        hardware = HardwareConfig(micro_batch=B, zero_stage=case["zero_stage"])
        kept: list = []

        def train() -> None:
            engine = start_engine(
                VAE(config, n_genes), lambda m: make_optimizer(OptimConfig(), m), hardware, 1.0, world, B * world.size
            )
            ema = EMA(engine, 0.9)
            for _ in range(3):
                _, predicted = engine.model(given, given.gene_ids, None)
                engine.backward(predicted.nll_B(given, size_B).mean() / world.size)
                engine.step(1e-4)
                ema.update()
            kept.append((engine, ema))

        peaks.append(measure(train, 0, world.device).peak_bytes if not peaks else _peak(train))
        kept.clear()
    if world.is_first:
        out.write_text(json.dumps(peaks))
    close_world()
