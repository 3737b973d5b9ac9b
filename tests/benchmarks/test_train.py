"""The benchmark of the loop: that it runs, that its ways do the same work, and that no GPU's figure is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train
from scldm.model.dit import DiTConfig
from scldm.model.flops import vae_flops
from scldm.model.vae import VAEConfig
from scldm.parallel.dist import World
from scldm.train.step_cost import StepCost, dit_step, vae_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_says_what_the_loop_adds(tmp_path: Path) -> None:
    saved = tmp_path / "train.json"
    words = ["steps=5", "rounds=1", "cells=4", "n_genes=30", "model.width=16", "model.n_layers=1", f"save={saved}"]
    # a process of its own: DeepSpeed warns when it is imported, and warnings are errors here
    command = [sys.executable, "-m", "benchmarks.train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]
    rows = {row["name"]: row for row in json.loads(saved.read_text())["rows"]}
    assert rows["loop on the plain engine - bare step"]["target"] == "<= 2"
    assert all(rows[f"{way}: a step"]["value"] > 0 for way in ("bare", "plain", "deepspeed", "fsdp"))
    assert sum(row["value"] is None for row in rows.values()) == 4
    assert done.stdout.count("not measured on a GPU") == 4
    command[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]
    report = json.loads(saved.read_text())
    assert report["command"].startswith("torchrun --standalone --nproc-per-node 2 -m benchmarks.train steps=5")
    rows = {row["name"]: row["value"] for row in report["rows"]}
    assert {f"fsdp / deepspeed at zero_stage={stage}" for stage in (2, 3)} < rows.keys()
    assert all(value > 0 for value in rows.values())


def test_presets_are_composed_as_users_of_one_gpu_do() -> None:
    for kind, micro_batch in (("cuda", 128), ("cpu", 32)):
        words = train.on_device(["vae/20m", "model.n_layers=1"], torch.device(kind))
        assert train.preset_work(words, 300).batch.n_cells == micro_batch


def test_compiled_blocks_are_measured_beside_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    work = train.preset_work(["ldm/tiny", "hardware.micro_batch=2", "model.n_layers=1", "model.compile=true"], 300)
    config = train.BenchTrainConfig(steps=3, rounds=1)
    row = train.compiled_row(work, [1.0], config, World(0, 1, torch.device("cpu")))
    assert len(compiled) == 1
    assert (row.value or 0) > 0


# as for a GPU, but for tiny shapes; a plan's memory is asked for too, and MFU needs a peak
PRESETS = """
import json, sys
from benchmarks import train
from scldm.parallel.dist import close_world, world_of_environment
train.peak_flops = lambda device, precision: 1e12
config, world = train.BenchTrainConfig(steps=4, rounds=1, log_every=1), world_of_environment()
rows = []
for words in (["vae/tiny", "hardware.micro_batch=4"], ["ldm/tiny", "hardware.micro_batch=4", "model.n_layers=1"]):
    rows += train.preset_rows(words, 300, config, world)
close_world()
json.dump({row.name: row.value for row in rows}, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_what_a_gpu_is_measured_with_runs_on_any_device(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRESETS, str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 16
    for preset, cost in (("vae/tiny", vae_cost()), ("ldm/tiny", dit_cost())):
        cells_per_s = rows[f"{preset}: cells/s on the deepspeed engine"]
        assert rows[f"{preset}: MFU"] == pytest.approx(cells_per_s * cost.flops / 4 / 1e12)
        assert rows[f"{preset}: peak memory"] > 0
        assert all(rows[f"{preset}: {engine} / bare step"] > 0.5 for engine in ("deepspeed", "fsdp"))
    by_formula = 3 * sum(vae_flops(vae_shape(), 4, 100, 100).values())
    assert rows["vae/tiny: MFU by the formula's FLOPs"] == pytest.approx(
        rows["vae/tiny: cells/s on the deepspeed engine"] * by_formula / 4 / 1e12
    )


def vae_cost() -> StepCost:
    """Of what vae/tiny says, at 300 genes of which a third is given."""
    return vae_step(vae_shape(), 300, 4, 100, 100, (True, True), bf16=True)


def vae_shape() -> VAEConfig:
    return VAEConfig(64, 8, 16, 1, 4, decoder_cross_heads=1)


def dit_cost() -> StepCost:
    return dit_step(DiTConfig(64, 1, 4, library_size=True), 64, 16, {}, 4, bf16=True)


def test_a_lone_process_without_deepspeed_keeps_one_copy_of_the_weights() -> None:
    cost = StepCost(1_000, 800, 0, 0, 20_000, 23_000)
    memory = train.plain_memory(cost)
    assert memory.training == 4_000 + 8_000 + 4_000 + 23_000  # weights, moments, EMA; gradients in the pass
    assert train.plain_memory(StepCost(1_000, 800, 0, 0, 0, 0)).training == 16_000 + 16_000  # then AdamW's are the most
