"""Costs of a step against the formula, and planned memory against what real ranks took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scldm.count_basis import N_BINS
from scldm.model.attention import sdpa
from scldm.model.dit import DiTConfig
from scldm.model.flops import vae_flops
from scldm.model.vae import VAEConfig
from scldm.train.budget import fsdp_memory, fsdp_sent_bytes, rank_memory, sent_bytes
from scldm.train.step_cost import StepCost, dit_step, step_cost, vae_step

ROOT = Path(__file__).resolve().parents[3]
SHAPE = VAEConfig(width=32, n_latents=4, latent_width=4, n_layers=2, n_heads=2, attention="plain")


@pytest.mark.heavy
def test_the_formula_path_takes_the_flops_of_the_formula() -> None:
    cost = vae_step(SHAPE, 500, 3, 120, 90)
    of_counts = 2 * 3 * 120 * (N_BINS + 1) * SHAPE.width  # products with counts, which get no gradient
    assert cost.flops == 3 * sum(vae_flops(SHAPE, 3, 120, 90).values()) - of_counts
    again = vae_step(VAEConfig(**{**vars(SHAPE), "recompute": True}), 500, 3, 120, 90)
    assert again.flops > cost.flops
    assert again.peak_bytes < cost.peak_bytes


def test_kernels_are_counted_and_views_are_not() -> None:
    """Forward: product, GELU, sum. Backward: the gradient's start, GELU, product for the weights, sum for the bias."""

    def loss_of(run: nn.Module) -> Tensor:
        return run(torch.ones(3, 4)).view(-1).sum()

    cost = step_cost(lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU()), loss_of)
    inputs = 1
    assert cost.kernels == inputs + 3 + 4


def test_torchs_attention_counts_as_the_products_that_it_makes() -> None:
    """Two forward, and in backward four and the scores again. A trace meets the CPU's kernel, which torch does not
    count."""
    B, L, K, D = 3, 8, 16, 32

    def loss_of(run: nn.Module) -> Tensor:
        x = run(torch.ones(B, L, D))
        return sdpa(x, x[:, :1].expand(B, K, D), x[:, :1].expand(B, K, D), 2).sum()

    linear = 2 * 2 * B * L * D * D  # forward, and the weights' gradient
    assert step_cost(lambda: nn.Linear(D, D), loss_of).flops == linear + 7 * 2 * B * L * K * D


def test_gradients_of_a_table_that_is_read_twice_are_added_in_place() -> None:
    def loss_of(table: nn.Module) -> Tensor:
        return (table(torch.zeros(3, dtype=torch.int64)) * table(torch.ones(3, dtype=torch.int64))).sum()

    cost = step_cost(lambda: nn.Embedding(1_000, 8), loss_of)
    assert 0 <= cost.peak_bytes - 2 * 4 * cost.n_parameters < 1_000  # torch takes two tables' memory, not three


@pytest.mark.heavy
def test_activations_grow_with_cells_and_gradients_with_parameters() -> None:
    one, two = (dit_step(DiTConfig(32, 2, 2), 4, 8, {"type": 3}, n) for n in (50, 100))
    assert two.flops == 2 * one.flops
    assert 1.8 < two.peak_bytes / one.peak_bytes < 2.1
    assert one.peak_bytes <= one.peak_with_gradients_bytes <= one.peak_bytes + 4 * one.n_parameters


def test_states_are_shared_out_as_the_stages_say() -> None:
    cost = StepCost(1_000, 800, 0, 0, 500, 600)
    for stage, kept in ((1, 4), (2, 4), (3, 0.5)):
        memory = rank_memory(cost, stage, 8)
        assert memory.weights == kept * 1_000
        assert memory.moments == 1_000  # two of four bytes, an eighth of them
    assert rank_memory(cost, 2, 8, offload=True).peak < rank_memory(cost, 2, 8).peak
    assert sent_bytes(cost, 1, 1, 4) == 0
    # ZeRO-2 sums 4,000 bytes twice around a ring of two, and gathers as many; in bf16 linear maps are exchanged in two
    assert sent_bytes(cost, 2, 2, 1) == 0.5 * (2 * 4_000 + 4_000)
    assert sent_bytes(cost, 3, 2, 3, bf16=True) == 0.5 * 3 * 3 * (2 * 800 + 4 * 200)


def test_fsdp_gathers_blocks_one_by_one_and_the_rest_at_once() -> None:
    cost = StepCost(1_000, 800, 0, 0, 20_000, 21_000, 600, 200, (20_000, 15_000, 10_000, 5_000))
    whole, freed = (fsdp_memory(cost, stage, 4, 1) for stage in (2, 3))
    assert whole.weights == freed.weights == 1_000  # a quarter of the masters, with no copy beside them
    assert (whole.gathered, freed.gathered) == (4 * 1_200, 4 * 400 + 4 * 600)
    assert (whole.buckets, whole.activations) == (freed.buckets, freed.activations) == (0, 20_000)
    assert (whole.gradients, fsdp_memory(cost, 2, 4, 2).gradients) == (0, 1_000)
    assert fsdp_memory(cost, 3, 4, 1, offload=True).host == 4_000
    # three quarters of each number. At zero_stage 2 two sums and a gather, at 3 two sums, and two gathers or four
    assert fsdp_sent_bytes(cost, 2, 4, 2) == 0.75 * 4 * 3_000
    assert fsdp_sent_bytes(cost, 3, 4, 2) == 0.75 * 4 * (2_000 + 2 * 400 + 4 * 600)
    assert fsdp_sent_bytes(cost, 3, 1, 2) == 0


def test_under_fsdp_buckets_meet_the_activations_of_their_own_time() -> None:
    """Where all blocks need the same, one of the last has most: its buckets, and gradients of those before it."""
    cost = StepCost(1_000, 800, 0, 0, 20_000, 21_000, 600, 200, (20_000, 20_000, 20_000, 5_000))
    memory = fsdp_memory(cost, 3, 4, 1)
    assert (memory.gathered, memory.buckets) == (4 * (400 + 400), 4 * (200 + 200 / 4))
    assert fsdp_memory(cost, 2, 4, 2).buckets == 4 * (200 + 200 / 4)
    first = fsdp_memory(replace(cost, block_peaks=(30_000, 15_000, 10_000, 5_000)), 3, 4, 1)
    assert first.states + first.validation == memory.states + memory.validation  # forward gathers what it did


def test_block_peaks_hold_gradients_of_the_rest_and_of_one_block() -> None:
    """Three maps of 100 numbers each, the first and the last of which are blocks, and inputs of 10 numbers."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(3))
            self.blocks = [self.maps[0], self.maps[2]]

        def forward(self, x: Tensor) -> Tensor:
            for linear in self.maps:
                x = linear(x)
            return x

    cost = step_cost(Three, lambda run: run(torch.ones(1, 10)).sum())
    assert (cost.block_parameters, cost.largest_block) == (200, 100)
    last, middle_and_first, end = cost.block_peaks
    assert 4 * 100 <= last < 4 * 200
    assert 4 * 200 <= middle_and_first < 4 * 300  # without the last block's, which another rank may have
    assert end == 0


def test_what_validation_and_saving_take_is_planned() -> None:
    cost = StepCost(1_000, 800, 0, 0, 20_000, 20_000)
    memory = rank_memory(cost, 1, 1, bucket=0)
    assert memory.peak == memory.training + 4_000  # the weights, put by for the EMA
    assert memory.saved == 16_000  # weights, EMA, two moments
    assert rank_memory(cost, 1, 1, offload=True, bucket=0).validation == 20_000


SMALL = {"kind": "vae", "model": {"width": 64, "n_latents": 16, "n_layers": 2, "n_heads": 4}}
SMALL |= {"n_genes": 20_000, "n_given": 2_048, "cells": 32}
MID = {"kind": "vae", "model": {"width": 256, "n_latents": 64, "n_layers": 4, "n_heads": 4}}
MID |= {"n_genes": 30_000, "n_given": 1_024, "cells": 4}
DEEP = {"kind": "ldm", "model": {"width": 256, "n_layers": 8, "n_heads": 8}, "latent_shape": [64, 16], "cells": 8}


def recomputed(network: dict[str, Any]) -> dict[str, Any]:
    return {**network, "model": {**network["model"], "recompute": True}}


def planned_of_measured(cases: list[dict[str, Any]], tmp_path: Path) -> dict[str, float]:
    """Planned memory of each case / what one of two ranks took."""
    (tmp_path / "cases.json").write_text(json.dumps([cases[0], *cases]))  # the first also imports
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.scldm.train.peak_memory", str(tmp_path / "cases.json"), str(tmp_path / "peaks.json")]
    # what is freed goes back to the system at once, so that the peak is of what lived
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3_000:]
    ratios, costs = {}, dict[str, StepCost]()
    for case, peak in zip(cases, json.loads((tmp_path / "peaks.json").read_text())[1:], strict=True):
        network = str({**case, "zero_stage": 0})
        costs[network] = costs.get(network) or cost_of(case)
        if case.get("engine") == "fsdp":
            planned = fsdp_memory(costs[network], case["zero_stage"], 2, 1)
        else:
            planned = rank_memory(costs[network], case["zero_stage"], 2, case["precision"] == "bf16", lazy=True)
        ratios[str(case)] = planned.training / peak  # none of them validates
    return ratios


def cost_of(case: dict[str, Any]) -> StepCost:
    how: Any = {"device": "cpu", "bf16": case["precision"] == "bf16"}
    if case["kind"] == "ldm":
        n_latents, latent_width = case["latent_shape"]
        return dit_step(DiTConfig(**case["model"]), n_latents, latent_width, {}, case["cells"], **how)
    sizes: Any = [case[name] for name in ("n_genes", "cells", "n_given", "n_given")]
    return vae_step(VAEConfig(**case["model"]), *sizes, **how)


@pytest.mark.slow
def test_planned_memory_is_within_15_percent_of_what_ranks_took(tmp_path: Path) -> None:
    cases = [{**case, "zero_stage": stage, "precision": "fp32"} for case in (SMALL, MID) for stage in (1, 2, 3)]
    cases += [{**case, "engine": "fsdp", "zero_stage": 3, "precision": "fp32"} for case in (SMALL, MID)]
    ratios = planned_of_measured(cases, tmp_path)
    assert all(abs(ratio - 1) < 0.15 for ratio in ratios.values()), ratios


@pytest.mark.exhaustive  # two minutes each
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_so_it_is_in_bf16_with_recomputation_and_for_the_diffusion_transformer(tmp_path: Path, precision: str) -> None:
    networks = [recomputed(SMALL), recomputed(MID), DEEP, recomputed(DEEP)]
    networks += [SMALL, MID] if precision == "bf16" else []
    cases = [{**case, "zero_stage": stage, "precision": precision} for case in networks for stage in (1, 2, 3)]
    cases += [{**case, "engine": "fsdp"} for case in cases if case["zero_stage"] > 1]
    ratios = planned_of_measured(cases, tmp_path)
    assert all(abs(ratio - 1) < 0.15 for ratio in ratios.values()), ratios
